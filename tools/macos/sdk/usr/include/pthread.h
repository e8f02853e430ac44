/* What libmfa uses of <pthread.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _PTHREAD_H
#define _PTHREAD_H

#include <signal.h>
#include <time.h>

#define PTHREAD_CANCEL_DISABLE 0
#define PTHREAD_CANCEL_ENABLE 1

typedef struct _opaque_pthread_t *pthread_t;
typedef struct {
    long signature;
    char opaque[56];
} pthread_attr_t, pthread_mutex_t;
typedef struct {
    long signature;
    char opaque[40];
} pthread_cond_t;
typedef struct {
    long signature;
    char opaque[8];
} pthread_condattr_t, pthread_mutexattr_t;

int pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int pthread_setcancelstate(int state, int *before);
int pthread_join(pthread_t thread, void **result);
int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes);
int pthread_mutex_destroy(pthread_mutex_t *mutex);
int pthread_mutex_lock(pthread_mutex_t *mutex);
int pthread_mutex_unlock(pthread_mutex_t *mutex);
int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes);
int pthread_cond_destroy(pthread_cond_t *condition);
int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex);
int pthread_cond_signal(pthread_cond_t *condition);
int pthread_cond_broadcast(pthread_cond_t *condition);

#endif

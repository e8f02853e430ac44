/* Objects and messages: what the runtime's own files share. A class's objects begin with struct metalsim_object; its
 * methods are the rows of facts.inc, whose types the functions below have. */
#ifndef METALSIM_RUNTIME_OBJECT_H
#define METALSIM_RUNTIME_OBJECT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/runtime.h"

/* Types by Apple's names. */
typedef struct metalsim_object *id;
typedef const char *SEL; /* one address for each text */
typedef bool BOOL;
typedef long NSInteger;
typedef unsigned long NSUInteger;
typedef struct {
    NSUInteger width, height, depth;
} MTLSize;

struct metalsim_class {
    const struct metalsim_class *isa; /* of all classes: metalsim_metaclass */
    const char *name;
    size_t size;         /* of an object */
    void (*finish)(id);  /* releases what it holds; NULL: nothing */
    const char *acts_as; /* another class, whose methods it has, too; or NULL */
};

struct metalsim_object {
    const struct metalsim_class *isa;
    atomic_int references; /* 0: gone. Its memory stays, so that a message to it is seen */
    id older, newer;       /* of all that are alive */
};

extern const struct metalsim_class metalsim_metaclass;
#define CLASS(name, is_public) extern const struct metalsim_class metalsim_class_##name;
#include "runtime/classes.inc"
#undef CLASS

#define METALSIM_CLASS(class_name, type, finish)                                                                       \
    const struct metalsim_class metalsim_class_##class_name = {&metalsim_metaclass, #class_name, sizeof(type), finish, \
                                                               NULL};

/* The methods: metalsim_<function>(self, selector, ...). */
#define SELF id, SEL
#define FACT(class_name, kind, selector, ownership, since, result, function, types, source) \
    result metalsim_##function types;
#include "runtime/facts.inc"
#undef FACT

/* --- Objects --- */

/* A new one, owned by the caller, all else 0. */
id metalsim_object_create(const struct metalsim_class *class);

void metalsim_retain(id object);  /* nil is good, */
void metalsim_release(id object); /* as here */

/* Passes the caller's ownership to the innermost pool; returns the object. */
id metalsim_autorelease(id object);

METALSIM_EXPORT void *objc_autoreleasePoolPush(void);
METALSIM_EXPORT void objc_autoreleasePoolPop(void *pool);

/* Whether it is an alive object of the class; else a finding that names `what`. nil is wrong, too. */
int metalsim_object_is(id object, const struct metalsim_class *class, const char *what);

/* A borrowed string; the text of one, or "". */
id metalsim_string(const char *text);
const char *metalsim_text(id string);

/* The text of a file URL; "" for nil. */
const char *metalsim_url_path(id url);

/* An array of one object, owned by the caller. */
id metalsim_array_create(id object);

/* Of an array; NULL: there are fewer. */
id metalsim_array_object(id array, size_t i);

/* A borrowed error. */
id metalsim_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The method of a fact by its class's or NSObject's row; NULL: the class, as of this macOS, has no such method. */
const struct metalsim_fact *metalsim_message_fact(const struct metalsim_class *class, char kind, SEL selector);

/* --- Settings, counts, findings --- */

extern struct metalsim_settings metalsim_now;

/* Counts, atomically. */
struct metalsim_counters {
#define COUNT(name) atomic_uint_fast64_t name;
#include "runtime/counts.inc"
#undef COUNT
};
extern struct metalsim_counters metalsim_counters;
#define METALSIM_COUNT(name) atomic_fetch_add(&metalsim_counters.name, 1)

/* What a Mac would end the process for, or never say. */
void metalsim_find(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Whether this fault happens now. */
int metalsim_fails(enum metalsim_fault fault);
/* The same for faults of one function's pipelines. */
int metalsim_fails_for(enum metalsim_fault fault, const char *function);

#endif

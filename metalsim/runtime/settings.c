/* What the machine is like, what goes wrong on purpose, what was counted and found; from a test or the environment. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "runtime/object.h"

#define FINDINGS 256 /* kept */

struct metalsim_settings metalsim_now;
struct metalsim_counters metalsim_counters;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *findings[FINDINGS];
static size_t found;
static unsigned occasions; /* for the fault */

static const char *const fault_names[METALSIM_FAULT_COUNT] = {
#define FAULT(name, text) text,
#include "runtime/faults.inc"
#undef FAULT
};

/* --- Settings ------------------------------------------------------------------------------------- */

static const char *text_of(const char *variable, const char *otherwise)
{
    const char *text = getenv(variable);
    return text && *text ? text : otherwise;
}

static int number_of(const char *variable, int otherwise)
{
    return atoi(text_of(variable, "")) ? atoi(text_of(variable, "")) : otherwise;
}

static void read_fault(const char *text, struct metalsim_settings *settings)
{
    const size_t length = strcspn(text, ":");
    for (int fault = 0; fault < METALSIM_FAULT_COUNT; fault++)
        if (strlen(fault_names[fault]) == length && !strncmp(fault_names[fault], text, length)) {
            settings->fault = (enum metalsim_fault)fault;
            settings->after = text[length] ? (unsigned)atoi(text + length + 1) : 0;
            return;
        }
    metalsim_find("METALSIM_FAULT is \"%s\"; there is no such fault", text);
}

void metalsim_runtime_defaults(struct metalsim_settings *settings)
{
    *settings = (struct metalsim_settings){
        .family = number_of("METALSIM_FAMILY", 7),
        .macos = number_of("METALSIM_MACOS", 14),
        .name = "Apple M1 (metalsim)",
        .build = text_of("METALSIM_BUILD", "23A344"),
        .threads = 32,
        .memory = (uint64_t)1 << 32,
        .cache = text_of("METALSIM_CACHE", "build/metalsim"),
        .checked = number_of("METALSIM_CHECKED", 0),
        .unoptimised = number_of("METALSIM_UNOPTIMISED", 0),
        .aborts = number_of("METALSIM_ABORT", 0),
    };
    read_fault(text_of("METALSIM_FAULT", "none"), settings);
}

void metalsim_runtime_set(const struct metalsim_settings *settings)
{
    pthread_mutex_lock(&lock);
    metalsim_now = *settings;
    occasions = 0;
    pthread_mutex_unlock(&lock);
}

const char *metalsim_runtime_fault_name(enum metalsim_fault fault)
{
    return fault_names[fault];
}

int metalsim_fails(enum metalsim_fault fault)
{
    if (metalsim_now.fault != fault)
        return 0;
    pthread_mutex_lock(&lock);
    const unsigned occasion = occasions++;
    const struct metalsim_settings *s = &metalsim_now;
    const int fails = occasion >= s->after && (!s->times || occasion - s->after < s->times);
    pthread_mutex_unlock(&lock);
    if (fails)
        METALSIM_COUNT(faults);
    return fails;
}

int metalsim_fails_for(enum metalsim_fault fault, const char *function)
{
    return (!metalsim_now.function || !strcmp(metalsim_now.function, function)) && metalsim_fails(fault);
}

/* sysctl(3), as far as a host asks for the build of the system. */
METALSIM_EXPORT int sysctlbyname(const char *name, void *old, size_t *old_length, void *new, size_t new_length);
int sysctlbyname(const char *name, void *old, size_t *old_length, void *new, size_t new_length)
{
    const size_t length = strlen(metalsim_now.build) + 1;
    if (strcmp(name, "kern.osversion") || new || new_length || !old_length || (old && *old_length < length))
        return -1;
    if (old)
        memcpy(old, metalsim_now.build, length);
    *old_length = length;
    return 0;
}

/* --- Findings ------------------------------------------------------------------------------------- */

void metalsim_find(const char *format, ...)
{
    char *text = NULL;
    va_list values;
    va_start(values, format);
    const int length = vasprintf(&text, format, values);
    va_end(values);
    if (length < 0)
        abort();
    if (metalsim_now.aborts) {
        fprintf(stderr, "metalsim: %s\n", text);
        abort();
    }
    pthread_mutex_lock(&lock);
    if (found < FINDINGS)
        findings[found++] = text;
    else
        free(text);
    pthread_mutex_unlock(&lock);
}

size_t metalsim_runtime_findings(void)
{
    pthread_mutex_lock(&lock);
    const size_t count = found;
    pthread_mutex_unlock(&lock);
    return count;
}

const char *metalsim_runtime_finding(size_t i)
{
    return i < metalsim_runtime_findings() ? findings[i] : NULL;
}

/* --- Counts --------------------------------------------------------------------------------------- */

void metalsim_runtime_count(struct metalsim_counts *counts)
{
#define COUNT(name) counts->name = atomic_load(&metalsim_counters.name);
#include "runtime/counts.inc"
#undef COUNT
}

void metalsim_runtime_clear(void)
{
    pthread_mutex_lock(&lock);
    while (found)
        free(findings[--found]);
    pthread_mutex_unlock(&lock);
    const uint64_t objects = atomic_load(&metalsim_counters.objects), pools = atomic_load(&metalsim_counters.pools);
#define COUNT(name) atomic_store(&metalsim_counters.name, 0);
#include "runtime/counts.inc"
#undef COUNT
    atomic_store(&metalsim_counters.objects, objects);
    atomic_store(&metalsim_counters.pools, pools);
}

/* --- A process ------------------------------------------------------------------------------------ */

static void report(void)
{
    const char *path = getenv("METALSIM_REPORT");
    FILE *file = path && *path ? fopen(path, "w") : NULL;
    struct metalsim_counts counts;
    if (!file)
        return;
    metalsim_runtime_count(&counts);
#define COUNT(name) fprintf(file, #name " %llu\n", (unsigned long long)counts.name);
#include "runtime/counts.inc"
#undef COUNT
    for (size_t i = 0; i < metalsim_runtime_findings(); i++)
        fprintf(file, "finding: %s\n", metalsim_runtime_finding(i));
    fclose(file);
}

__attribute__((constructor)) static void begin(void)
{
    metalsim_runtime_defaults(&metalsim_now);
    atexit(report);
}

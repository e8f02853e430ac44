/* What the parts of the runtime's Metal know of each other. */
#ifndef METALSIM_RUNTIME_METAL_H
#define METALSIM_RUNTIME_METAL_H

#include "runtime/object.h"
#include "runtime/program.h"

struct buffer {
    struct metalsim_object object;
    unsigned char *bytes;
    size_t length;
    unsigned char *mapping; /* with a guard page after the bytes; NULL: the memory is a caller's */
    size_t mapped;
    int unwritten;  /* what is there means nothing yet */
    int is_private; /* to the GPU */
};

struct library {
    struct metalsim_object object;
    struct program **programs; /* one for each text that it is made from */
    size_t count;
    uint64_t hash; /* of the texts and how they were compiled */
};

struct function {
    struct metalsim_object object;
    id library;
    struct program *program; /* of the library's */
    char *name;
    uint64_t hash;
};

struct pipeline {
    struct metalsim_object object;
    id function;
    uint64_t threads; /* at most */
};

/* The function that a MTLComputePipelineDescriptor names, or NULL. */
struct function *metalsim_description_function(id descriptor);

/* Whether one of the archives has the code of a function with that hash. */
int metalsim_archive_has(id archives, uint64_t hash);

/* An owned queue. */
id metalsim_queue_create(void);

/* A dispatch as it has been encoded: with buffers retained and bytes copied. */
struct dispatch {
    struct pipeline *pipeline;
    struct argument {
        struct buffer *buffer;
        unsigned char *bytes; /* with no buffer: owned */
        size_t length, offset;
    } arguments[PROGRAM_BUFFERS];
    uint64_t threadgroup_lengths[PROGRAM_BUFFERS], threadgroups[3], threads[3];
    int behind_barrier; /* those before it must be done */
    int concurrent;     /* else each waits for the one before it */
    int retains;        /* the buffers; else it is the host that keeps them */
};

/* Takes over the dispatch, which belongs to an encoder of this command buffer. */
void metalsim_command_buffer_add(id command_buffer, const struct dispatch *dispatch);

/* The encoder of the command buffer has ended. */
void metalsim_command_buffer_encoded(id command_buffer);

/* An owned encoder. */
id metalsim_encoder_create(id command_buffer, int concurrent, int retains);

/* Executes it; NULL, or what went wrong, valid until the thread's next dispatch. */
const char *metalsim_dispatch_execute(const struct dispatch *dispatch);
void metalsim_dispatch_finish(struct dispatch *dispatch);

#endif

#define _GNU_SOURCE
#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* Reads both pipes until the program has closed them. */
static void collect(const int pipes[2], struct metalsim_text *const texts[2])
{
    struct pollfd polls[2] = {{.fd = pipes[0], .events = POLLIN}, {.fd = pipes[1], .events = POLLIN}};
    while (polls[0].fd >= 0 || polls[1].fd >= 0) {
        if (poll(polls, 2, -1) < 0 && errno != EINTR)
            return;
        for (int i = 0; i < 2; i++) {
            char bytes[4096];
            if (polls[i].fd < 0 || !polls[i].revents)
                continue;
            ssize_t got = read(polls[i].fd, bytes, sizeof bytes);
            if (got > 0)
                metalsim_text_add_bytes(texts[i], bytes, (size_t)got);
            else if (got == 0 || errno != EINTR)
                polls[i].fd = -1;
        }
    }
}

static int spawn(const char *const *words, const int out[2], const int error[2], pid_t *child)
{
    posix_spawn_file_actions_t actions;
    if (posix_spawn_file_actions_init(&actions))
        return 0;
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_adddup2(&actions, error[1], 2);
    int failed = posix_spawnp(child, words[0], &actions, NULL, (char *const *)words, environ);
    posix_spawn_file_actions_destroy(&actions);
    return !failed;
}

int metalsim_command_run(const char *const *words, struct metalsim_text *output, struct metalsim_text *errors)
{
    int out[2], error[2], code = -1;
    if (pipe2(out, O_CLOEXEC))
        return -1;
    if (pipe2(error, O_CLOEXEC)) {
        close(out[0]), close(out[1]);
        return -1;
    }
    pid_t child;
    int started = spawn(words, out, error, &child);
    close(out[1]), close(error[1]);
    if (started) {
        collect((const int[2]){out[0], error[0]}, (struct metalsim_text *const[2]){output, errors});
        int status;
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
        code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    close(out[0]), close(error[0]);
    return code;
}

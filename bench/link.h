/*
 * A client's connection to a server: commands out, their replies in, all of them checked.
 *
 * What goes wrong ends the program, with a line that says what.
 */
#ifndef BENCH_LINK_H
#define BENCH_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

enum { NO_FD = -1 };

/* A command and the room for its reply; both may be used any number of times. */
struct exchange {
    struct header *request;
    struct header *reply;
    size_t reply_size;
};

/* Zeros. */
void *allocate(size_t size);

/* Nanoseconds of a clock that only goes on. */
uint64_t now(void);

/* Sorts them. */
uint64_t median(uint64_t *values, size_t count);

/* Waits until the server, started a moment ago perhaps, listens at ``path``. */
int connect_to(const char *path);
void negotiate(int fd);

struct exchange exchange_new(enum command command, size_t payload_size, size_t reply_payload_size);
void exchange_free(struct exchange *x);

/* The payload of a message, of whatever type it is. */
void *payload(struct header *message);

void send_request(int fd, struct exchange *x);
void receive_reply(int fd, struct exchange *x, bool raw);
void call(int fd, struct exchange *x);

/* Sends the request with a file descriptor. */
void call_with_fd(int fd, struct exchange *x, int passed);

struct exchange region_access(enum command command, unsigned region, uint64_t offset, size_t count);

/* Guest memory from address 0 on: that of ``memory_fd``, or NO_FD. */
void dma_map(int fd, size_t size, int memory_fd);

#endif

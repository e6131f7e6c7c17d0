#define _GNU_SOURCE
#include "link.h"

#include <err.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CONNECT_SECONDS = 20, REPLY_SECONDS = 20 };

void *allocate(size_t size)
{
    void *block = calloc(1, size);
    if (!block)
        err(EXIT_FAILURE, "calloc");
    return block;
}

uint64_t now(void)
{
    struct timespec t;
    if (clock_gettime(CLOCK_MONOTONIC, &t) < 0)
        err(EXIT_FAILURE, "clock_gettime");
    return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

uint64_t median(uint64_t *values, size_t count)
{
    qsort(values, count, sizeof *values, by_value);
    return values[count / 2];
}

int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        errx(EXIT_FAILURE, "%s: too long", path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        err(EXIT_FAILURE, "socket");
    uint64_t deadline = now() + CONNECT_SECONDS * UINT64_C(1000000000);
    while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        if ((errno != ENOENT && errno != ECONNREFUSED) || now() > deadline)
            err(EXIT_FAILURE, "connect %s", path);
        usleep(5000);
    }
    struct timeval limit = {.tv_sec = REPLY_SECONDS};
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) < 0)
        err(EXIT_FAILURE, "setsockopt");
    return fd;
}

/* ---- one command and its reply ---- */

struct exchange exchange_new(enum command command, size_t payload_size, size_t reply_payload_size)
{
    struct exchange x = {.reply_size = sizeof(struct header) + reply_payload_size};
    x.request = allocate(sizeof *x.request + payload_size);
    x.reply = allocate(x.reply_size);
    x.request->command = command;
    x.request->size = sizeof *x.request + payload_size;
    return x;
}

void exchange_free(struct exchange *x)
{
    free(x->request);
    free(x->reply);
}

void *payload(struct header *message)
{
    return message + 1;
}

void send_request(int fd, struct exchange *x)
{
    x->request->id++;
    for (size_t done = 0; done < x->request->size;) {
        ssize_t n = send(fd, (char *)x->request + done, x->request->size - done, MSG_NOSIGNAL);
        if (n < 0)
            err(EXIT_FAILURE, "send");
        done += n;
    }
}

static void check_reply(const struct exchange *x)
{
    const struct header *request = x->request, *reply = x->reply;
    if (reply->id != request->id || reply->command != request->command || reply->flags != REPLY ||
        reply->size != x->reply_size)
        errx(EXIT_FAILURE, "command %u: reply %u to %u, flags %#x, error %u, %u bytes instead of %zu",
             request->command, reply->id, request->id, reply->flags, reply->error, reply->size, x->reply_size);
}

void receive_reply(int fd, struct exchange *x, bool raw)
{
    for (size_t done = 0; done < x->reply_size;) {
        ssize_t n = recv(fd, (char *)x->reply + done, x->reply_size - done, 0);
        if (n < 0)
            err(EXIT_FAILURE, "recv");
        if (n == 0)
            errx(EXIT_FAILURE, "command %u: the server is gone", x->request->command);
        if (!raw && done < sizeof *x->reply && done + n >= sizeof *x->reply)
            check_reply(x); /* at once: an error's reply is shorter than what is awaited here */
        done += n;
    }
}

void call(int fd, struct exchange *x)
{
    send_request(fd, x);
    receive_reply(fd, x, false);
}

void call_with_fd(int fd, struct exchange *x, int passed)
{
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof passed)];
    } control = {.head = {.cmsg_len = CMSG_LEN(sizeof passed), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &passed, sizeof passed);
    struct iovec whole = {x->request, x->request->size};
    struct msghdr message = {
        .msg_iov = &whole, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    x->request->id++;
    if (sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)whole.iov_len)
        err(EXIT_FAILURE, "sendmsg");
    receive_reply(fd, x, false);
}

/* ---- commands that every client has ---- */

void negotiate(int fd)
{
    static const char json[] = "{\"capabilities\":{\"max_data_xfer_size\":1048576}}";
    struct exchange x = exchange_new(VERSION, sizeof(struct version) + sizeof json, 4096);
    struct version *version = payload(x.request);
    version->minor = 1;
    memcpy(version->json, json, sizeof json);
    send_request(fd, &x);
    if (recv(fd, x.reply, sizeof *x.reply, MSG_WAITALL) != sizeof *x.reply)
        err(EXIT_FAILURE, "recv of the reply to VERSION");
    if (x.reply->size < sizeof *x.reply || x.reply->size > x.reply_size)
        errx(EXIT_FAILURE, "a reply to VERSION of %u bytes", x.reply->size);
    x.reply_size = x.reply->size; /* the server chooses it: the one reply whose size is not known before */
    check_reply(&x);
    ssize_t rest = x.reply_size - sizeof *x.reply;
    if (recv(fd, payload(x.reply), rest, MSG_WAITALL) != rest)
        err(EXIT_FAILURE, "recv of the reply to VERSION");
    exchange_free(&x);
}

struct exchange region_access(enum command command, unsigned region, uint64_t offset, size_t count)
{
    size_t fixed = sizeof(struct region_access);
    bool write = command == REGION_WRITE;
    struct exchange x = exchange_new(command, write ? fixed + count : fixed, write ? fixed : fixed + count);
    *(struct region_access *)payload(x.request) =
        (struct region_access){.offset = offset, .region = region, .count = count};
    return x;
}

void dma_map(int fd, size_t size, int memory_fd)
{
    struct exchange x = exchange_new(DMA_MAP, sizeof(struct dma_map), 0);
    *(struct dma_map *)payload(x.request) =
        (struct dma_map){.argsz = sizeof(struct dma_map), .flags = DMA_READABLE | DMA_WRITABLE, .size = size};
    if (memory_fd == NO_FD)
        call(fd, &x);
    else
        call_with_fd(fd, &x, memory_fd);
    exchange_free(&x);
}

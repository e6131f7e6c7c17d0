/*
 * What the server under test is measured against: as little as a server in C can do.
 *
 *   server SOCKET rpc          vfio-user as libvfio-user serves it, system call by system call: recvmsg of the
 *                              header with room for 1024 fds, recv of the body, one sendmsg of the reply.
 *                              Knows VERSION, and REGION_READ and REGION_WRITE of up to 1 MiB at one region.
 *   server SOCKET stream I O   no protocol: reads I bytes, writes O bytes, and so on
 *
 * Clients are served one after the other, until the process is ended.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "wire.h"

static uint8_t memory[MAX_DATA_XFER_SIZE];

static void *allocate(size_t size)
{
    void *block = malloc(size);
    if (!block)
        err(EXIT_FAILURE, "malloc");
    return block;
}

/* ---- stream ---- */

static bool read_all(int fd, uint8_t *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = read(fd, data + done, size - done);
        if (n < 0)
            err(EXIT_FAILURE, "read");
        if (n == 0)
            return false;
        done += n;
    }
    return true;
}

static void write_all(int fd, const uint8_t *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = write(fd, data + done, size - done);
        if (n < 0)
            err(EXIT_FAILURE, "write");
        done += n;
    }
}

static void serve_stream(int fd, size_t in_size, size_t out_size)
{
    uint8_t *in = allocate(in_size), *out = allocate(out_size);
    memset(out, 0x5a, out_size);
    while (read_all(fd, in, in_size))
        write_all(fd, out, out_size);
    free(in);
    free(out);
}

/* ---- rpc ---- */

static bool receive_header(int fd, struct header *header)
{
    char control[CMSG_SPACE(sizeof(int) * MAX_MSG_FDS)];
    struct iovec iov = {header, sizeof *header};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(fd, &msg, 0);
    if (n < 0)
        err(EXIT_FAILURE, "recvmsg");
    if (n != 0 && n != sizeof *header)
        errx(EXIT_FAILURE, "%zd bytes of a header", n);
    return n != 0;
}

static void *receive_body(int fd, size_t size)
{
    void *body = allocate(size);
    ssize_t n = recv(fd, body, size, 0);
    if (n < 0)
        err(EXIT_FAILURE, "recv");
    if ((size_t)n != size)
        errx(EXIT_FAILURE, "%zd bytes of a body of %zu", n, size);
    return body;
}

static void send_reply(int fd, struct header header, void *payload, size_t size)
{
    header.size = sizeof header + size;
    header.flags = REPLY;
    struct iovec iov[] = {{&header, sizeof header}, {payload, size}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};
    ssize_t n = sendmsg(fd, &msg, MSG_NOSIGNAL);
    if (n < 0)
        err(EXIT_FAILURE, "sendmsg");
    if (n != header.size)
        errx(EXIT_FAILURE, "%zd bytes of a reply of %u", n, header.size);
}

static void check_access(const struct region_access *access, size_t size)
{
    if (size < sizeof *access || access->offset > sizeof memory ||
        access->count > sizeof memory - access->offset)
        errx(EXIT_FAILURE, "a region access out of bounds");
}

static void region_read(int fd, const struct header *header, const struct region_access *access)
{
    size_t size = sizeof *access + access->count;
    struct region_access *reply = allocate(size);
    *reply = *access;
    memcpy(reply->data, memory + access->offset, access->count);
    send_reply(fd, *header, reply, size);
    free(reply);
}

static void region_write(int fd, const struct header *header, struct region_access *access, size_t size)
{
    if (size - sizeof *access != access->count)
        errx(EXIT_FAILURE, "a REGION_WRITE of the wrong size");
    memcpy(memory + access->offset, access->data, access->count);
    if (!(header->flags & NO_REPLY))
        send_reply(fd, *header, access, sizeof *access);
}

static void serve_rpc(int fd)
{
    struct header header;
    while (receive_header(fd, &header)) {
        if (header.size <= sizeof header || header.size > MAX_MSG_SIZE)
            errx(EXIT_FAILURE, "a message of %u bytes", header.size);
        size_t size = header.size - sizeof header;
        void *body = receive_body(fd, size);
        switch (header.command) {
        case VERSION:
            send_reply(fd, header, body, size);
            break;
        case REGION_READ:
            check_access(body, size);
            region_read(fd, &header, body);
            break;
        case REGION_WRITE:
            check_access(body, size);
            region_write(fd, &header, body, size);
            break;
        default:
            errx(EXIT_FAILURE, "command %u", header.command);
        }
        free(body);
    }
}

/* ---- main ---- */

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        errx(EXIT_FAILURE, "%s: too long", path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        err(EXIT_FAILURE, "socket");
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        err(EXIT_FAILURE, "bind %s", path);
    if (listen(fd, 1) < 0)
        err(EXIT_FAILURE, "listen");
    return fd;
}

int main(int argc, char **argv)
{
    bool rpc = argc == 3 && strcmp(argv[2], "rpc") == 0;
    if (!rpc && !(argc == 5 && strcmp(argv[2], "stream") == 0))
        errx(2, "usage: server SOCKET (rpc | stream IN_SIZE OUT_SIZE)");

    int listener = listen_at(argv[1]);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            err(EXIT_FAILURE, "accept");
        if (rpc)
            serve_rpc(fd);
        else
            serve_stream(fd, strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
        if (close(fd) < 0)
            err(EXIT_FAILURE, "close");
    }
}

/*
 * A ping-pong client: one message out, its reply in, the clock around both.
 *
 *   client SOCKET MODE SIZE WARMUP COUNT [raw]
 *
 *   region-read, region-write    REGION_READ, REGION_WRITE of SIZE bytes
 *   mig-read, mig-write          MIG_DATA_READ, MIG_DATA_WRITE of SIZE bytes
 *   report                       DMA_LOGGING_REPORT for SIZE bytes of guest memory, every page of 4 KiB dirty
 *   posted                       SIZE REGION_WRITEs of 4 bytes without a reply, then one REGION_READ that has one
 *
 * Prints the median time in nanoseconds of COUNT exchanges (posted: that time divided by SIZE). Every reply is
 * checked, and so is, once the clock has stopped, that the data arrived whole: see device.py for what the
 * server has to be. With "raw" the very same bytes go to a server that only counts them, and nothing is checked.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "link.h"

enum { MEMORY_REGION = 0, CONTROL_REGION = 1, PORT_REGION = 2 };
enum { DIRTY_ALL = 0, BYTES_TAKEN = 8 }; /* registers of the control region, 8 bytes each */
enum { DIRTY_PAGE = 4096 };

/* ---- commands ---- */

static struct exchange mig_data(enum command command, size_t size)
{
    size_t fixed = sizeof(struct mig_data);
    struct exchange x = command == MIG_DATA_READ ? exchange_new(command, fixed, fixed + size)
                                                 : exchange_new(command, fixed + size, 0);
    *(struct mig_data *)payload(x.request) = (struct mig_data){.argsz = fixed + size, .size = size};
    return x;
}

static struct exchange report(size_t length)
{
    size_t fixed = sizeof(struct feature_report);
    size_t words = (length / DIRTY_PAGE + 63) / 64;
    struct exchange x = exchange_new(DEVICE_FEATURE, fixed, fixed + 8 * words);
    *(struct feature_report *)payload(x.request) = (struct feature_report){
        .argsz = fixed + 8 * words,
        .flags = FEATURE_GET | DMA_LOGGING_REPORT,
        .length = length,
        .page_size = DIRTY_PAGE,
    };
    return x;
}

static void set_state(int fd, uint32_t state)
{
    size_t size = sizeof(struct feature_state);
    struct exchange x = exchange_new(DEVICE_FEATURE, size, size);
    *(struct feature_state *)payload(x.request) =
        (struct feature_state){.argsz = size, .flags = FEATURE_SET | MIG_DEVICE_STATE, .state = state};
    call(fd, &x);
    exchange_free(&x);
}

static void start_logging(int fd, size_t length)
{
    size_t size = sizeof(struct feature_start);
    struct exchange x = exchange_new(DEVICE_FEATURE, size, size);
    *(struct feature_start *)payload(x.request) = (struct feature_start){
        .argsz = size,
        .flags = FEATURE_SET | DMA_LOGGING_START,
        .page_size = DIRTY_PAGE,
        .num_ranges = 1,
        .length = length,
    };
    call(fd, &x);
    exchange_free(&x);
}

static void write_control(int fd, uint64_t offset, uint64_t value)
{
    struct exchange x = region_access(REGION_WRITE, CONTROL_REGION, offset, sizeof value);
    memcpy(((struct region_access *)payload(x.request))->data, &value, sizeof value);
    call(fd, &x);
    exchange_free(&x);
}

static uint64_t read_control(int fd, uint64_t offset)
{
    uint64_t value;
    struct exchange x = region_access(REGION_READ, CONTROL_REGION, offset, sizeof value);
    call(fd, &x);
    memcpy(&value, ((struct region_access *)payload(x.reply))->data, sizeof value);
    exchange_free(&x);
    return value;
}

/* ---- data that shows where it came from ---- */

static void fill(uint8_t *data, size_t size, unsigned seed)
{
    for (size_t i = 0; i < size; i++)
        data[i] = (i + seed) % 251;
}

static void expect(const uint8_t *data, size_t size, unsigned seed, const char *what)
{
    for (size_t i = 0; i < size; i++)
        if (data[i] != (i + seed) % 251)
            errx(EXIT_FAILURE, "%s: byte %zu of %zu is %u", what, i, size, data[i]);
}

/* ---- modes ---- */

struct run {
    int fd;
    size_t size;
    uint64_t exchanges;
    struct exchange x;
    struct exchange barrier; /* posted only */
};

static void region_read_prepare(struct run *run)
{
    struct exchange x = region_access(REGION_WRITE, MEMORY_REGION, 0, run->size);
    fill(((struct region_access *)payload(x.request))->data, run->size, 7);
    call(run->fd, &x);
    exchange_free(&x);
}

static void region_read_build(struct run *run)
{
    run->x = region_access(REGION_READ, MEMORY_REGION, 0, run->size);
}

static void region_read_verify(struct run *run)
{
    expect(((struct region_access *)payload(run->x.reply))->data, run->size, 7, "REGION_READ");
}

static void expect_all_taken(struct run *run, const char *what)
{
    uint64_t taken = read_control(run->fd, BYTES_TAKEN);
    if (taken != run->exchanges * run->size)
        errx(EXIT_FAILURE, "%s: %lu bytes arrived of %lu", what, taken, run->exchanges * run->size);
}

static void region_write_prepare(struct run *run)
{
    write_control(run->fd, BYTES_TAKEN, 0);
}

static void region_write_build(struct run *run)
{
    run->x = region_access(REGION_WRITE, PORT_REGION, 0, run->size);
    fill(((struct region_access *)payload(run->x.request))->data, run->size, 11);
}

/* The port has counted. What it was given is not to be seen there: the same once more goes to memory, and back. */
static void region_write_verify(struct run *run)
{
    expect_all_taken(run, "REGION_WRITE");
    ((struct region_access *)payload(run->x.request))->region = MEMORY_REGION;
    call(run->fd, &run->x);
    struct exchange x = region_access(REGION_READ, MEMORY_REGION, 0, run->size);
    call(run->fd, &x);
    expect(((struct region_access *)payload(x.reply))->data, run->size, 11, "REGION_WRITE");
    exchange_free(&x);
}

static void mig_read_prepare(struct run *run)
{
    set_state(run->fd, STOP_COPY);
}

static void mig_read_build(struct run *run)
{
    run->x = mig_data(MIG_DATA_READ, run->size);
}

static void mig_read_verify(struct run *run)
{
    struct mig_data *data = payload(run->x.reply);
    if (data->size != run->size)
        errx(EXIT_FAILURE, "MIG_DATA_READ: %u bytes instead of %zu", data->size, run->size);
    expect(data->data, run->size, 0, "MIG_DATA_READ");
    set_state(run->fd, RUNNING);
}

static void mig_write_prepare(struct run *run)
{
    write_control(run->fd, BYTES_TAKEN, 0);
    set_state(run->fd, RESUMING);
}

static void mig_write_build(struct run *run)
{
    run->x = mig_data(MIG_DATA_WRITE, run->size);
    fill(((struct mig_data *)payload(run->x.request))->data, run->size, 13);
}

static void mig_write_verify(struct run *run)
{
    set_state(run->fd, RUNNING);
    expect_all_taken(run, "MIG_DATA_WRITE");
}

static void report_prepare(struct run *run)
{
    dma_map(run->fd, run->size, NO_FD);
    start_logging(run->fd, run->size);
}

static void report_build(struct run *run)
{
    run->x = report(run->size);
}

static void report_before(struct run *run)
{
    write_control(run->fd, DIRTY_ALL, run->size);
}

static void report_verify(struct run *run)
{
    const uint8_t *bitmap = ((struct feature_report *)payload(run->x.reply))->bitmap;
    for (size_t i = 0; i < run->size / DIRTY_PAGE / 8; i++)
        if (bitmap[i] != 0xff)
            errx(EXIT_FAILURE, "DMA_LOGGING_REPORT: byte %zu is %#x", i, bitmap[i]);
}

static void posted_build(struct run *run)
{
    run->x = region_access(REGION_WRITE, MEMORY_REGION, 0, sizeof(uint32_t));
    run->x.request->flags = NO_REPLY;
    run->barrier = region_access(REGION_READ, MEMORY_REGION, 0, sizeof(uint32_t));
}

/* SIZE writes of a counter; the read behind them must find its last value. */
static void posted_exchange(struct run *run)
{
    uint8_t *written = ((struct region_access *)payload(run->x.request))->data;
    for (uint32_t i = 1; i <= run->size; i++) {
        memcpy(written, &i, sizeof i);
        send_request(run->fd, &run->x);
    }
    call(run->fd, &run->barrier);
    if (memcmp(((struct region_access *)payload(run->barrier.reply))->data, written, sizeof(uint32_t)) != 0)
        errx(EXIT_FAILURE, "posted writes: the last one is missing behind the barrier");
}

static void call_exchange(struct run *run)
{
    call(run->fd, &run->x);
}

static void raw_exchange(struct run *run)
{
    send_request(run->fd, &run->x);
    receive_reply(run->fd, &run->x, true);
}

static void nothing(struct run *run)
{
    (void)run;
}

static const struct mode {
    const char *name;
    void (*prepare)(struct run *);  /* once, before the first exchange */
    void (*build)(struct run *);    /* the messages to exchange */
    void (*before)(struct run *);   /* before each exchange, outside its time */
    void (*exchange)(struct run *); /* what is timed */
    void (*verify)(struct run *);   /* once, after the last */
} modes[] = {
    {"region-read", region_read_prepare, region_read_build, nothing, call_exchange, region_read_verify},
    {"region-write", region_write_prepare, region_write_build, nothing, call_exchange, region_write_verify},
    {"mig-read", mig_read_prepare, mig_read_build, nothing, call_exchange, mig_read_verify},
    {"mig-write", mig_write_prepare, mig_write_build, nothing, call_exchange, mig_write_verify},
    {"report", report_prepare, report_build, report_before, call_exchange, report_verify},
    {"posted", nothing, posted_build, nothing, posted_exchange, nothing},
};

/* ---- main ---- */

static struct mode find_mode(const char *name, bool raw)
{
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (strcmp(modes[i].name, name) == 0)
            return raw ? (struct mode){name, nothing, modes[i].build, nothing, raw_exchange, nothing} : modes[i];
    errx(2, "no such mode: %s", name);
}

static uint64_t measure(struct run *run, const struct mode *mode, size_t warmup, size_t count)
{
    uint64_t *times = allocate(count * sizeof *times);
    for (size_t i = 0; i < warmup + count; i++) {
        mode->before(run);
        uint64_t start = now();
        mode->exchange(run);
        if (i >= warmup)
            times[i - warmup] = now() - start;
    }
    run->exchanges = warmup + count;
    uint64_t middle = median(times, count);
    free(times);
    return middle;
}

int main(int argc, char **argv)
{
    bool raw = argc == 7 && strcmp(argv[6], "raw") == 0;
    size_t count = argc >= 6 ? strtoull(argv[5], NULL, 0) : 0;
    if (!raw && argc != 6)
        errx(2, "usage: client SOCKET MODE SIZE WARMUP COUNT [raw]");
    if (count == 0)
        errx(2, "COUNT must be at least 1");

    struct mode mode = find_mode(argv[2], raw);
    struct run run = {.fd = connect_to(argv[1]), .size = strtoull(argv[3], NULL, 0)};
    if (!raw)
        negotiate(run.fd);
    mode.prepare(&run);
    mode.build(&run);
    uint64_t time = measure(&run, &mode, strtoull(argv[4], NULL, 0), count);
    mode.verify(&run);
    bool posted = mode.exchange == posted_exchange;
    printf("%.1f\n", (double)time / (posted ? run.size : 1));
    exchange_free(&run.x);
    exchange_free(&run.barrier);
    if (close(run.fd) < 0)
        err(EXIT_FAILURE, "close");
    return EXIT_SUCCESS;
}

/*
 * A driver of an NVMe controller over vfio-user: one queue pair, kept full. And what it is measured against.
 *
 *   nvme SOCKET LOAD BLOCK DEPTH COUNT [polled] [shadow] [scattered]
 *   nvme FILE LOAD BLOCK DEPTH COUNT plain [scattered]
 *
 * LOAD is read, write, random-read or random-write: COUNT commands of BLOCK bytes, DEPTH of them under way. The driver
 * sleeps until an interrupt comes (polled: it looks for completions without), takes what completions there are, sends
 * the next commands in their place, and rings once for all of them. shadow: doorbells go through memory where they may.
 * scattered: no two pages of a buffer lie one behind the other.
 *
 * plain: no controller, but a preadv or pwritev of the file for each command, of the same blocks into such memory.
 *
 * Prints nanoseconds per command: the median over slices of the run, twice as many commands each as are under way (one,
 * where that is one), so that it is not what else the machine does that is measured. Every page of the disk bears its
 * number, which is looked at whenever it is read; what was written is read again once the clock has stopped.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "link.h"

enum { PAGE = 4096, MAX_DEPTH = 64, MAX_BLOCK = 256 << 10, MAX_PAGES = MAX_BLOCK / PAGE, WAIT_SECONDS = 50 };

/* ---- NVM Express 1.4 ---- */

enum { CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELLS = 0x1000, STRIDE = 8 };
enum { CC_ENABLE = 1 | 6 << 16 | 4 << 20 }; /* entries of 64 and of 16 bytes */
enum { CREATE_SQ = 0x01, CREATE_CQ = 0x05, IDENTIFY = 0x06, DOORBELL_BUFFERS = 0x7c };
enum { CONTIGUOUS = 1 << 0, INTERRUPTS = 1 << 1 };
enum { WRITE = 0x01, READ = 0x02 };

struct command_entry {
    uint8_t opcode;
    uint8_t flags;
    uint16_t cid;
    uint32_t nsid;
    uint64_t reserved[2];
    uint64_t prp[2];
    uint32_t dword[6]; /* from dword 10 on */
};

struct completion_entry {
    uint32_t result;
    uint32_t reserved;
    uint16_t sq_head;
    uint16_t sq;
    uint16_t cid;
    _Atomic uint16_t status; /* bit 0: the phase */
};

/* ---- memory that the device shares; addresses are offsets in there ---- */

enum { QUEUE_ENTRIES = 256, VECTORS = 2 };
enum {
    ADMIN_SQ = 0x10000,
    ADMIN_CQ = 0x20000,
    IO_SQ = 0x30000,
    IO_CQ = 0x40000,
    SHADOW = 0x50000,
    EVENTS = 0x51000,
    IDENTITY = 0x52000,
    PRP_LISTS = 0x60000, /* one page for each command */
    BUFFERS = 0x100000,
    MEMORY = BUFFERS + MAX_DEPTH * MAX_BLOCK,
};

struct memory {
    int fd;
    uint8_t *bytes;
};

static struct memory memory_new(void)
{
    struct memory m = {.fd = memfd_create("guest", MFD_CLOEXEC)};
    if (m.fd < 0 || ftruncate(m.fd, MEMORY) < 0)
        err(EXIT_FAILURE, "memfd_create");
    m.bytes = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, m.fd, 0);
    if (m.bytes == MAP_FAILED)
        err(EXIT_FAILURE, "mmap");
    return m;
}

/* ---- what is asked for ---- */

static const struct load {
    const char *name;
    bool write;
    bool random;
} loads[] = {
    {"read", false, false},
    {"write", true, false},
    {"random-read", false, true},
    {"random-write", true, true},
};

struct job {
    struct load load;
    size_t block; /* bytes */
    unsigned depth;
    bool polled, shadow, scattered;
    struct memory memory;
    uint64_t places; /* blocks of the disk */
    uint64_t next;
    uint64_t stamp;            /* beside the page's number in all that this run writes */
    uint64_t place[MAX_DEPTH]; /* where each buffer is read from, or written to */
};

/* ---- the clock ---- */

struct watch {
    uint64_t *times; /* nanoseconds per command, by slice */
    size_t slices;
    uint64_t slice; /* commands */
    uint64_t done, since;
};

static struct watch watch_new(const struct job *job, uint64_t count)
{
    struct watch watch = {.slice = job->depth > 1 ? 2 * job->depth : 1, .since = now()};
    if (count < watch.slice)
        errx(2, "at least %lu commands", watch.slice);
    watch.times = allocate((count / watch.slice) * sizeof *watch.times);
    return watch;
}

static void watch_look(struct watch *watch, uint64_t done)
{
    if (done - watch->done < watch->slice)
        return;
    uint64_t time = now();
    watch->times[watch->slices++] = (time - watch->since) / (done - watch->done);
    watch->since = time;
    watch->done = done;
}

static uint64_t watch_stop(struct watch *watch)
{
    uint64_t middle = median(watch->times, watch->slices);
    free(watch->times);
    return middle;
}

/* ---- data ---- */

static uint64_t random_number(void)
{
    static uint64_t x = 88172645463325252;
    x ^= x << 13;
    x ^= x >> 7;
    return x ^= x << 17;
}

static uint64_t places_in(const struct job *job, uint64_t size)
{
    if (size < job->block)
        errx(EXIT_FAILURE, "a disk of %lu bytes", size);
    return size / job->block;
}

static uint64_t next_place(struct job *job)
{
    return (job->load.random ? random_number() : job->next++) % job->places;
}

/* The address of a page of a buffer. */
static uint64_t page_address(const struct job *job, unsigned slot, size_t page)
{
    size_t pages = job->block / PAGE;
    return BUFFERS + (uint64_t)slot * job->block + (job->scattered ? pages - 1 - page : page) * PAGE;
}

static uint64_t *page_at(const struct job *job, unsigned slot, size_t page)
{
    return (uint64_t *)(job->memory.bytes + page_address(job, slot, page));
}

enum { NUMBER = 0, STAMP = 1, NUMBER_AGAIN = PAGE / sizeof(uint64_t) - 1 };

/* The contents of a buffer before it is written. */
static void fill(const struct job *job, unsigned slot)
{
    size_t pages = job->block / PAGE;
    for (size_t page = 0; page < pages; page++) {
        uint64_t *words = page_at(job, slot, page);
        words[NUMBER] = words[NUMBER_AGAIN] = job->place[slot] * pages + page;
        words[STAMP] = job->stamp;
    }
}

static void expect(const struct job *job, unsigned slot, bool stamped)
{
    size_t pages = job->block / PAGE;
    for (size_t page = 0; page < pages; page++) {
        uint64_t *words = page_at(job, slot, page), number = job->place[slot] * pages + page;
        if (words[NUMBER] != number || words[NUMBER_AGAIN] != number || (stamped && words[STAMP] != job->stamp))
            errx(EXIT_FAILURE, "page %lu: %lu %lu of %#lx is there", number, words[NUMBER], words[NUMBER_AGAIN],
                 words[STAMP]);
        words[NUMBER] = words[NUMBER_AGAIN] = UINT64_MAX; /* or the next one to be read here might never come */
    }
}

/* ---- the controller ---- */

struct queue {
    unsigned number, tail, head, phase, rung;
    struct command_entry *commands;
    struct completion_entry *completions;
};

struct controller {
    int fd;
    int interrupt;
    struct job *job;
    struct queue admin, io;
    unsigned block_shift; /* of the namespace */
};

static void write_register(int fd, unsigned region, uint64_t offset, uint64_t value, size_t size)
{
    struct exchange x = region_access(REGION_WRITE, region, offset, size);
    memcpy(((struct region_access *)payload(x.request))->data, &value, size);
    call(fd, &x);
    exchange_free(&x);
}

static uint32_t read_register(int fd, uint64_t offset)
{
    uint32_t value;
    struct exchange x = region_access(REGION_READ, 0, offset, sizeof value);
    call(fd, &x);
    memcpy(&value, ((struct region_access *)payload(x.reply))->data, sizeof value);
    exchange_free(&x);
    return value;
}

static struct queue queue_new(const struct memory *memory, unsigned number, uint64_t commands, uint64_t completions)
{
    return (struct queue){
        .number = number,
        .phase = 1,
        .commands = (struct command_entry *)(memory->bytes + commands),
        .completions = (struct completion_entry *)(memory->bytes + completions),
    };
}

static void submit(struct queue *queue, struct command_entry entry)
{
    queue->commands[queue->tail] = entry;
    queue->tail = (queue->tail + 1) % QUEUE_ENTRIES;
}

/* The next completion, where there is one. */
static const struct completion_entry *reap(struct queue *queue)
{
    struct completion_entry *entry = &queue->completions[queue->head];
    unsigned status = atomic_load_explicit(&entry->status, memory_order_acquire);
    if ((status & 1) != queue->phase)
        return NULL;
    if (status >> 1)
        errx(EXIT_FAILURE, "command %u of queue %u: status %#x", entry->cid, queue->number, status >> 1);
    if (++queue->head == QUEUE_ENTRIES) {
        queue->head = 0;
        queue->phase ^= 1;
    }
    return entry;
}

/* A REGION_WRITE without a reply. */
struct doorbell {
    struct header header;
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    uint32_t value;
} __attribute__((packed));

static struct doorbell doorbell_new(uint64_t offset, uint32_t value)
{
    return (struct doorbell){
        .header = {.command = REGION_WRITE, .size = sizeof(struct doorbell), .flags = NO_REPLY},
        .offset = offset,
        .count = sizeof value,
        .value = value,
    };
}

/* Through memory: whether the host passed the point from which on the controller wants to hear of it. */
static bool mirrored(const struct job *job, uint64_t offset, uint16_t old, uint16_t new)
{
    _Atomic uint32_t *shadow = (_Atomic uint32_t *)(job->memory.bytes + SHADOW + offset);
    volatile uint32_t *event = (uint32_t *)(job->memory.bytes + EVENTS + offset);
    atomic_store(shadow, new); /* seen before the event index is read */
    return (uint16_t)(new - *event - 1) >= (uint16_t)(new - old);
}

/* What was taken, and what was submitted since it was last rung. */
static void ring(struct controller *c, struct queue *queue, unsigned old_head)
{
    uint64_t tail = STRIDE * queue->number, head = tail + 4;
    bool shadow = c->job->shadow && queue->number;
    struct doorbell bells[2];
    size_t count = 0;
    if (queue->head != old_head && !(shadow && mirrored(c->job, head, old_head, queue->head)))
        bells[count++] = doorbell_new(DOORBELLS + head, queue->head);
    if (queue->tail != queue->rung && !(shadow && mirrored(c->job, tail, queue->rung, queue->tail)))
        bells[count++] = doorbell_new(DOORBELLS + tail, queue->tail);
    queue->rung = queue->tail;
    ssize_t size = count * sizeof *bells;
    if (size && send(c->fd, bells, size, MSG_NOSIGNAL) != size)
        err(EXIT_FAILURE, "send");
}

static void admin(struct controller *c, struct command_entry entry)
{
    unsigned head = c->admin.head;
    submit(&c->admin, entry);
    ring(c, &c->admin, head);
    while (!reap(&c->admin))
        usleep(100);
    ring(c, &c->admin, head);
}

static void enable(struct controller *c)
{
    write_register(c->fd, CONFIG_REGION, 4, 6, 2); /* memory, bus master */
    write_register(c->fd, 0, CC, 0, 4);
    while (read_register(c->fd, CSTS) & 1)
        usleep(1000);
    memset(c->job->memory.bytes, 0, BUFFERS);
    write_register(c->fd, 0, AQA, (QUEUE_ENTRIES - 1) | (QUEUE_ENTRIES - 1) << 16, 4);
    write_register(c->fd, 0, ASQ, ADMIN_SQ, 8);
    write_register(c->fd, 0, ACQ, ADMIN_CQ, 8);
    write_register(c->fd, 0, CC, CC_ENABLE, 4);
    while (!(read_register(c->fd, CSTS) & 1))
        usleep(1000);
}

static void set_interrupts(struct controller *c)
{
    struct exchange x = exchange_new(SET_IRQS, sizeof(struct irq_set), 0);
    *(struct irq_set *)payload(x.request) = (struct irq_set){
        .argsz = sizeof(struct irq_set),
        .flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER,
        .index = MSIX_IRQ,
        .start = 1,
        .count = 1,
    };
    c->interrupt = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->interrupt < 0)
        err(EXIT_FAILURE, "eventfd");
    call_with_fd(c->fd, &x, c->interrupt);
    exchange_free(&x);
}

/* Bytes of the namespace. */
static uint64_t identify(struct controller *c)
{
    const uint8_t *identity = c->job->memory.bytes + IDENTITY;
    uint64_t blocks;
    admin(c, (struct command_entry){.opcode = IDENTIFY, .nsid = 1, .prp = {IDENTITY}});
    memcpy(&blocks, identity, sizeof blocks);
    c->block_shift = identity[128 + 4 * (identity[26] & 0xf) + 2]; /* of the LBA format in use */
    return blocks << c->block_shift;
}

static void create_queues(struct controller *c)
{
    unsigned size_and_number = (QUEUE_ENTRIES - 1) << 16 | 1;
    unsigned interrupts = c->job->polled ? 0 : INTERRUPTS | 1 << 16; /* by vector 1 */
    admin(c, (struct command_entry){
                 .opcode = CREATE_CQ, .prp = {IO_CQ}, .dword = {size_and_number, CONTIGUOUS | interrupts}});
    admin(c, (struct command_entry){
                 .opcode = CREATE_SQ, .prp = {IO_SQ}, .dword = {size_and_number, CONTIGUOUS | 1 << 16}});
    if (c->job->shadow)
        admin(c, (struct command_entry){.opcode = DOORBELL_BUFFERS, .prp = {SHADOW, EVENTS}});
}

/* The data pointer of a buffer (4.3): its pages, or a list of them. */
static void describe(const struct job *job, unsigned slot, uint64_t prp[2])
{
    size_t pages = job->block / PAGE;
    uint64_t *list = (uint64_t *)(job->memory.bytes + PRP_LISTS + slot * PAGE);
    for (size_t page = 1; page < pages; page++)
        list[page - 1] = page_address(job, slot, page);
    prp[0] = page_address(job, slot, 0);
    prp[1] = pages == 1 ? 0 : pages == 2 ? list[0] : PRP_LISTS + slot * PAGE;
}

static void wait_for_completions(struct controller *c)
{
    if (c->job->polled) {
        sched_yield();
        return;
    }
    struct pollfd pollfd = {.fd = c->interrupt, .events = POLLIN};
    uint64_t count;
    if (poll(&pollfd, 1, -1) != 1 || read(c->interrupt, &count, sizeof count) != sizeof count)
        err(EXIT_FAILURE, "waiting for an interrupt");
}

static void send_command(struct controller *c, unsigned slot, bool write)
{
    struct job *job = c->job;
    uint64_t blocks = job->block >> c->block_shift, first = job->place[slot] * blocks;
    struct command_entry entry = {
        .opcode = write ? WRITE : READ,
        .cid = slot,
        .nsid = 1,
        .dword = {first, first >> 32, blocks - 1},
    };
    describe(job, slot, entry.prp);
    if (write)
        fill(job, slot);
    submit(&c->io, entry);
}

static void send_next(struct controller *c, unsigned slot)
{
    c->job->place[slot] = next_place(c->job);
    send_command(c, slot, c->job->load.write);
}

static uint64_t run_commands(struct controller *c, uint64_t count)
{
    struct job *job = c->job;
    struct watch watch = watch_new(job, count);
    unsigned old_head = c->io.head;
    uint64_t sent = 0, done = 0;
    for (; sent < job->depth; sent++)
        send_next(c, sent);
    ring(c, &c->io, old_head);
    while (done < count) {
        const struct completion_entry *entry;
        for (old_head = c->io.head; (entry = reap(&c->io)); done++) {
            unsigned slot = entry->cid;
            if (!job->load.write)
                expect(job, slot, false);
            if (sent < count) {
                send_next(c, slot);
                sent++;
            }
        }
        if (old_head == c->io.head)
            wait_for_completions(c);
        else
            ring(c, &c->io, old_head);
        watch_look(&watch, done);
    }
    return watch_stop(&watch);
}

/* What was last written from each buffer. */
static void read_again(struct controller *c)
{
    unsigned old_head = c->io.head;
    for (unsigned slot = 0; slot < c->job->depth; slot++)
        send_command(c, slot, false);
    ring(c, &c->io, old_head);
    for (unsigned done = 0; done < c->job->depth; done++) {
        const struct completion_entry *entry;
        while (!(entry = reap(&c->io)))
            wait_for_completions(c);
        expect(c->job, entry->cid, true);
    }
    ring(c, &c->io, old_head);
}

static uint64_t warm_up(const struct job *job, uint64_t count)
{
    return count / 10 + 2 * job->depth;
}

static uint64_t drive(struct job *job, const char *path, uint64_t count)
{
    struct controller c = {.fd = connect_to(path), .job = job};
    negotiate(c.fd);
    dma_map(c.fd, MEMORY, job->memory.fd);
    enable(&c);
    c.admin = queue_new(&job->memory, 0, ADMIN_SQ, ADMIN_CQ);
    c.io = queue_new(&job->memory, 1, IO_SQ, IO_CQ);
    if (!job->polled)
        set_interrupts(&c);
    job->places = places_in(job, identify(&c));
    create_queues(&c);
    run_commands(&c, warm_up(job, count));
    uint64_t time = run_commands(&c, count);
    if (job->load.write)
        read_again(&c);
    write_register(c.fd, 0, CC, 0, 4);
    return time;
}

/* ---- without a controller ---- */

static void move(const struct job *job, int file, unsigned slot)
{
    struct iovec pages[MAX_PAGES];
    size_t count = job->scattered ? job->block / PAGE : 1;
    for (size_t page = 0; page < count; page++)
        pages[page] = (struct iovec){page_at(job, slot, page), job->block / count};
    off_t offset = job->place[slot] * job->block;
    ssize_t moved = job->load.write ? pwritev(file, pages, count, offset) : preadv(file, pages, count, offset);
    if (moved != (ssize_t)job->block)
        err(EXIT_FAILURE, "preadv or pwritev");
}

static uint64_t run_plain(struct job *job, int file, uint64_t count)
{
    struct watch watch = watch_new(job, count);
    for (uint64_t done = 0; done < count; done++) {
        unsigned slot = done % job->depth;
        job->place[slot] = next_place(job);
        if (job->load.write)
            fill(job, slot);
        move(job, file, slot);
        if (!job->load.write)
            expect(job, slot, false);
        watch_look(&watch, done + 1);
    }
    return watch_stop(&watch);
}

static uint64_t do_without(struct job *job, const char *path, uint64_t count)
{
    struct stat status;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) < 0)
        err(EXIT_FAILURE, "%s", path);
    job->places = places_in(job, status.st_size);
    run_plain(job, file, warm_up(job, count));
    return run_plain(job, file, count);
}

/* ---- main ---- */

static struct load find_load(const char *name)
{
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++)
        if (strcmp(loads[i].name, name) == 0)
            return loads[i];
    errx(2, "no such load: %s", name);
}

static bool has(char **words, const char *word)
{
    while (*words && strcmp(*words, word) != 0)
        words++;
    return *words;
}

int main(int argc, char **argv)
{
    if (argc < 6)
        errx(2, "usage: nvme SOCKET LOAD BLOCK DEPTH COUNT [polled] [shadow] [scattered]");
    char **words = argv + 6;
    uint64_t count = strtoull(argv[5], NULL, 0);
    struct job job = {
        .load = find_load(argv[2]),
        .block = strtoull(argv[3], NULL, 0),
        .depth = strtoul(argv[4], NULL, 0),
        .polled = has(words, "polled"),
        .shadow = has(words, "shadow"),
        .scattered = has(words, "scattered"),
        .stamp = now(),
    };
    if (!job.block || job.block > MAX_BLOCK || job.block % PAGE || !job.depth || job.depth > MAX_DEPTH || !count)
        errx(2, "whole pages up to %d bytes, a depth up to %d, one command at least", MAX_BLOCK, MAX_DEPTH);
    alarm(WAIT_SECONDS); /* for a server that has died, or completes nothing */
    job.memory = memory_new();
    uint64_t time = has(words, "plain") ? do_without(&job, argv[1], count) : drive(&job, argv[1], count);
    printf("%lu\n", time);
    return EXIT_SUCCESS;
}

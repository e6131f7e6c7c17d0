/*
 * The few messages of the vfio-user protocol that the benchmarks exchange, in host byte order.
 *
 * Source: the vfio-user specification; the feature structures are those of linux/vfio.h.
 */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#include <stdint.h>

#define MAX_MSG_FDS 1024
#define MAX_DATA_XFER_SIZE (1u << 20)
#define MAX_MSG_SIZE (MAX_DATA_XFER_SIZE + sizeof(struct header) + sizeof(struct region_access))

enum command {
    VERSION = 1,
    DMA_MAP = 2,
    SET_IRQS = 8,
    REGION_READ = 9,
    REGION_WRITE = 10,
    DEVICE_FEATURE = 16,
    MIG_DATA_READ = 17,
    MIG_DATA_WRITE = 18,
};

enum { COMMAND = 0x00, REPLY = 0x01, NO_REPLY = 0x10 };

enum { FEATURE_GET = 1 << 16, FEATURE_SET = 1 << 17 };
enum { MIG_DEVICE_STATE = 2, DMA_LOGGING_START = 6, DMA_LOGGING_REPORT = 8 };
enum { RUNNING = 2, STOP_COPY = 3, RESUMING = 4 };
enum { DMA_READABLE = 1, DMA_WRITABLE = 2 };
enum { IRQ_DATA_EVENTFD = 1 << 2, IRQ_ACTION_TRIGGER = 1 << 5 };
enum { MSIX_IRQ = 2 };
enum { CONFIG_REGION = 7 };

struct header {
    uint16_t id;
    uint16_t command;
    uint32_t size; /* of the whole message */
    uint32_t flags;
    uint32_t error;
};

struct version {
    uint16_t major;
    uint16_t minor;
    char json[];
};

struct region_access {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    uint8_t data[];
};

struct dma_map {
    uint32_t argsz;
    uint32_t flags;
    uint64_t offset;
    uint64_t address;
    uint64_t size;
};

struct irq_set {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t start;
    uint32_t count;
};

struct mig_data {
    uint32_t argsz;
    uint32_t size;
    uint8_t data[];
};

struct feature_state {
    uint32_t argsz;
    uint32_t flags;
    uint32_t state;
    uint32_t data_fd;
};

struct feature_start {
    uint32_t argsz;
    uint32_t flags;
    uint64_t page_size;
    uint32_t num_ranges;
    uint32_t reserved;
    uint64_t iova;
    uint64_t length;
};

struct feature_report {
    uint32_t argsz;
    uint32_t flags;
    uint64_t iova;
    uint64_t length;
    uint64_t page_size;
    uint8_t bitmap[];
};

#endif

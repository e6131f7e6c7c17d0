/*
 * Uses the edu device without a pause until a file is gone: DMA into many pages, whose contents it compares, and INTx.
 *
 *   edu_loop DEVICE UIO FILE
 *
 * DEVICE is its folder in /sys/bus/pci/devices, UIO what uio_pci_generic made of it. A round has the device take a page
 * and write it into the next of PAGES pages, then raise an interrupt, which must come within 10 seconds. All pages are
 * compared again and again: each must have what was written to it last. Exit status 0 and the number of rounds, which
 * the register for liveness shows all the time.
 */
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES = 64, BAR_SIZE = 1 << 20, BUFFER = 0x40000, PATIENCE = 10000 };
enum { LIVENESS = 0x04, IRQ_STATUS = 0x24, IRQ_RAISE = 0x60, IRQ_ACK = 0x64 };
enum { SOURCE = 0x80, DESTINATION = 0x88, COUNT = 0x90, COMMAND = 0x98, START = 1, TO_GUEST = 2 };
enum { PCI_COMMAND = 4, INTX_DISABLE_HIGH = 0x04 };

static volatile uint8_t *registers;

static int
opened(const char *folder, const char *name)
{
    char path[256];
    int fd;

    snprintf(path, sizeof path, "%s%s%s", folder, *name ? "/" : "", name);
    fd = open(path, O_RDWR | O_SYNC);
    if (fd < 0)
        err(1, "%s", path);
    return fd;
}

static uint64_t
physical(const void *page)
{
    uint64_t entry;
    int pagemap = open("/proc/self/pagemap", O_RDONLY);

    if (pagemap < 0 || pread(pagemap, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        err(1, "pagemap");
    close(pagemap);
    return (entry & ((UINT64_C(1) << 55) - 1)) * PAGE;
}

static void
copy(uint64_t source, uint64_t destination, uint64_t command)
{
    *(volatile uint64_t *)(registers + SOURCE) = source;
    *(volatile uint64_t *)(registers + DESTINATION) = destination;
    *(volatile uint64_t *)(registers + COUNT) = PAGE;
    *(volatile uint64_t *)(registers + COMMAND) = command | START;
    while (*(volatile uint64_t *)(registers + COMMAND) & START)
        usleep(500);
}

/* What a round writes into a page: cheap, as an emulated guest compares all pages in every round. */
static uint64_t
word_of(unsigned long round, int word)
{
    return (round * WORDS + (unsigned long)word) * UINT64_C(0x9E3779B97F4A7C15);
}

static void
fill(uint64_t *page, unsigned long round)
{
    for (int word = 0; word < WORDS; word++)
        page[word] = word_of(round, word);
}

static int
holds(const uint64_t *page, unsigned long round)
{
    for (int word = 0; word < WORDS; word++)
        if (page[word] != word_of(round, word))
            return 0;
    return 1;
}

static void
interrupt(int uio, int config, unsigned long round)
{
    struct pollfd ready = {.fd = uio, .events = POLLIN};
    uint8_t high;
    uint32_t count;

    *(volatile uint32_t *)(registers + IRQ_RAISE) = 1;
    if (poll(&ready, 1, PATIENCE) != 1)
        errx(1, "round %lu: the interrupt does not come", round);
    if (read(uio, &count, sizeof count) != sizeof count)
        err(1, "round %lu: uio", round);
    *(volatile uint32_t *)(registers + IRQ_ACK) = 1;
    if (*(volatile uint32_t *)(registers + IRQ_STATUS) != 0)
        errx(1, "round %lu: the interrupt does not go", round);
    /* The driver has set "interrupt disable" when it came. */
    if (pread(config, &high, 1, PCI_COMMAND + 1) != 1)
        err(1, "config");
    high &= (uint8_t)~INTX_DISABLE_HIGH;
    if (pwrite(config, &high, 1, PCI_COMMAND + 1) != 1)
        err(1, "config");
}

int
main(int argc, char **argv)
{
    uint64_t addresses[PAGES], from_address;
    unsigned long written[PAGES] = {0}, round;
    uint64_t *from, *to;
    int config, uio;

    if (argc != 4)
        errx(1, "usage: edu_loop DEVICE UIO FILE");
    config = opened(argv[1], "config");
    uio = opened(argv[2], "");
    registers = mmap(NULL, BAR_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, opened(argv[1], "resource0"), 0);
    from = mmap(NULL, (PAGES + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (registers == MAP_FAILED || from == MAP_FAILED || mlock(from, (PAGES + 1) * PAGE) < 0)
        err(1, "memory");
    memset(from, 0, (PAGES + 1) * PAGE);
    to = from + WORDS;
    from_address = physical(from);
    for (int page = 0; page < PAGES; page++)
        addresses[page] = physical(to + page * WORDS);

    for (round = 1; access(argv[3], F_OK) == 0; round++) {
        int page = (int)(round % PAGES);

        fill(from, round);
        copy(from_address, BUFFER, 0);
        copy(BUFFER, addresses[page], TO_GUEST);
        written[page] = round;
        interrupt(uio, config, round);
        *(volatile uint32_t *)(registers + LIVENESS) = (uint32_t)round;
        if (*(volatile uint32_t *)(registers + LIVENESS) != ~(uint32_t)round)
            errx(1, "round %lu: liveness", round);
        for (int other = 0; other < PAGES; other++)
            if (written[other] != 0 && !holds(to + other * WORDS, written[other]))
                errx(1, "round %lu: page %d is not what round %lu wrote", round, other, written[other]);
    }
    printf("%lu\n", round - 1);
    return 0;
}

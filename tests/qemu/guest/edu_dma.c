/*
 * Has the edu device copy a page of this program's memory into its buffer and back into another page.
 *
 *   edu_dma RESOURCE0 [ROUNDS]
 *
 * The device does DMA to the pages' physical addresses, which /proc/self/pagemap tells root. Bus mastering must be on.
 * Exit status 0 and the two addresses when every byte came back, in each of the rounds.
 */
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, BAR_SIZE = 1 << 20, BUFFER = 0x40000 };
enum { SOURCE = 0x80, DESTINATION = 0x88, COUNT = 0x90, COMMAND = 0x98 };
enum { START = 1, TO_GUEST = 2 };

static volatile uint8_t *registers;

/* A page that stays where it is. */
static uint8_t *
locked_page(void)
{
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED || mlock(page, PAGE) < 0)
        err(1, "a locked page");
    memset(page, 0, PAGE);
    return page;
}

static uint64_t
physical(const void *page)
{
    uint64_t entry;
    int pagemap = open("/proc/self/pagemap", O_RDONLY);

    if (pagemap < 0 || pread(pagemap, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        err(1, "pagemap");
    close(pagemap);
    entry &= (UINT64_C(1) << 55) - 1;
    if (entry == 0)
        errx(1, "pagemap hides the address");
    return entry * PAGE;
}

static void
copy(uint64_t source, uint64_t destination, uint64_t command)
{
    *(volatile uint64_t *)(registers + SOURCE) = source;
    *(volatile uint64_t *)(registers + DESTINATION) = destination;
    *(volatile uint64_t *)(registers + COUNT) = PAGE;
    *(volatile uint64_t *)(registers + COMMAND) = command | START;
    while (*(volatile uint64_t *)(registers + COMMAND) & START)
        usleep(1000); /* a device that never ends is ended by the test's timeout */
}

int
main(int argc, char **argv)
{
    int bar = argc > 1 ? open(argv[1], O_RDWR | O_SYNC) : -1;
    int rounds = argc > 2 ? atoi(argv[2]) : 1;
    uint8_t *from = locked_page(), *to = locked_page();
    uint64_t from_address = physical(from), to_address = physical(to);

    if (bar < 0)
        err(1, "which BAR?");
    registers = mmap(NULL, BAR_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    if (registers == MAP_FAILED)
        err(1, "%s", argv[1]);
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < PAGE; i++)
            from[i] = (uint8_t)(i * 7 + i / 256 + round);
        memset(to, 0, PAGE);
        copy(from_address, BUFFER, 0);
        copy(BUFFER, to_address, TO_GUEST);
        if (memcmp(from, to, PAGE) != 0)
            errx(1, "round %d: the page came back changed", round);
    }
    printf("%#" PRIx64 " %#" PRIx64 "\n", from_address, to_address);
    return 0;
}

/*
 * Takes interrupts of a device that uio_pci_generic is bound to.
 *
 *   uio_wait /dev/uio0 RESOURCE0 RAISE ACK CAUSE TIMES
 *
 * Writes CAUSE to the 32-bit register RAISE, waits for the interrupt, writes CAUSE to ACK, and again; prints how many
 * interrupts the kernel has counted then. Each interrupt leaves INTx disabled in the device's command register
 * (what uio_pci_generic does in its handler), and this enables it again.
 */
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { COMMAND = 4, INTX_DISABLE = 1 << 10, SECONDS = 30 };

static void
enable_intx(int config)
{
    uint16_t command;

    if (pread(config, &command, 2, COMMAND) != 2)
        err(1, "config");
    command &= (uint16_t)~INTX_DISABLE;
    if (pwrite(config, &command, 2, COMMAND) != 2)
        err(1, "config");
}

int
main(int argc, char **argv)
{
    char config_name[256];
    uint32_t count = 0;
    int uio, bar, config;
    volatile uint8_t *registers;

    if (argc != 7)
        errx(2, "six arguments are wanted");
    snprintf(config_name, sizeof config_name, "%s/config", dirname(strdup(argv[2])));
    uio = open(argv[1], O_RDWR);
    bar = open(argv[2], O_RDWR | O_SYNC);
    config = open(config_name, O_RDWR);
    if (uio < 0 || bar < 0 || config < 0)
        err(1, "open");
    registers = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    if (registers == MAP_FAILED)
        err(1, "%s", argv[2]);
    for (int i = 0; i < atoi(argv[6]); i++) {
        struct pollfd ready = {.fd = uio, .events = POLLIN};

        enable_intx(config);
        *(volatile uint32_t *)(registers + strtoul(argv[3], NULL, 0)) = (uint32_t)strtoul(argv[5], NULL, 0);
        if (poll(&ready, 1, SECONDS * 1000) != 1)
            errx(1, "no interrupt %d in %d s", i, SECONDS);
        if (read(uio, &count, 4) != 4)
            err(1, "%s", argv[1]);
        *(volatile uint32_t *)(registers + strtoul(argv[4], NULL, 0)) = (uint32_t)strtoul(argv[5], NULL, 0);
    }
    printf("%" PRIu32 "\n", count);
    return 0;
}

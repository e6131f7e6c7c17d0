/*
 * Accesses the edu device without a pause until it is gone.
 *
 *   edu_hammer RESOURCE0
 *
 * Writes a value to the liveness register and reads back its inverse, again and again. Ends when all that reads is all
 * ones, with exit status 0 and the number of rounds before; with 1 at a wrong value.
 */
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>

enum { LIVENESS = 4, GONE_AFTER = 4 };

int
main(int argc, char **argv)
{
    int bar = argc > 1 ? open(argv[1], O_RDWR | O_SYNC) : -1;
    unsigned long rounds = 0;
    int ones = 0;
    volatile uint8_t *registers;

    if (bar < 0)
        err(1, "which BAR?");
    registers = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    if (registers == MAP_FAILED)
        err(1, "%s", argv[1]);
    for (uint32_t value = 1; ones < GONE_AFTER; value = value % 0xFFFF + 1) { /* never 0, whose inverse is all ones */
        uint32_t read;

        *(volatile uint32_t *)(registers + LIVENESS) = value;
        read = *(volatile uint32_t *)(registers + LIVENESS);
        if (read == UINT32_MAX)
            ones++;
        else if (ones > 0)
            errx(1, "round %lu: alive again", rounds);
        else if (read != ~value)
            errx(1, "round %lu: %#" PRIx32 " is not the inverse of %#" PRIx32, rounds, read, value);
        else
            rounds++;
    }
    printf("%lu\n", rounds);
    return 0;
}

/*
 * Reads and writes a file of /sys/bus/pci/devices: a BAR (resource0...) or config space (config).
 *
 *   pcimem FILE r8|r16|r32|r64:OFFSET ... w8|w16|w32|w64:OFFSET=VALUE ...
 *
 * Does these in order, and prints what it reads, one hexadecimal value a line. A memory BAR is mapped, so that each
 * is one access of the CPU's; the kernel does those to an I/O BAR and to config space, by pread and pwrite.
 */
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int file;
static volatile uint8_t *mapped; /* NULL: no memory */

static uint64_t
get(uint64_t offset, unsigned bits)
{
    uint64_t value = 0;

    if (mapped == NULL) {
        if (pread(file, &value, bits / 8, (off_t)offset) != (ssize_t)(bits / 8))
            err(1, "read of %u bits at %#" PRIx64, bits, offset);
        return value;
    }
    switch (bits) {
    case 8: return *(mapped + offset);
    case 16: return *(volatile uint16_t *)(mapped + offset);
    case 32: return *(volatile uint32_t *)(mapped + offset);
    default: return *(volatile uint64_t *)(mapped + offset);
    }
}

static void
put(uint64_t offset, unsigned bits, uint64_t value)
{
    if (mapped == NULL) {
        if (pwrite(file, &value, bits / 8, (off_t)offset) != (ssize_t)(bits / 8))
            err(1, "write of %u bits at %#" PRIx64, bits, offset);
        return;
    }
    switch (bits) {
    case 8: *(mapped + offset) = (uint8_t)value; break;
    case 16: *(volatile uint16_t *)(mapped + offset) = (uint16_t)value; break;
    case 32: *(volatile uint32_t *)(mapped + offset) = (uint32_t)value; break;
    default: *(volatile uint64_t *)(mapped + offset) = value;
    }
}

static void
access_(const char *what, uint64_t size)
{
    char kind = 0;
    unsigned bits = 0;
    uint64_t offset = 0, value = 0;
    int fields = sscanf(what, "%c%u:%" SCNi64 "=%" SCNi64, &kind, &bits, &offset, &value);

    if ((kind != 'r' && kind != 'w') || fields != (kind == 'w' ? 4 : 3))
        errx(2, "%s: r32:OFFSET or w32:OFFSET=VALUE is wanted", what);
    if (bits != 8 && bits != 16 && bits != 32 && bits != 64)
        errx(2, "%s: no access of %u bits", what, bits);
    if (kind == 'w' && bits < 64 && value >> bits)
        errx(2, "%s: the value does not fit in %u bits", what, bits);
    if (offset > size || size - offset < bits / 8)
        errx(2, "%s: outside of %" PRIu64 " bytes", what, size);
    if (kind == 'w')
        put(offset, bits, value);
    else
        printf("%#" PRIx64 "\n", get(offset, bits));
}

/* Where in its page the BAR begins: a small one may share a page, and only pages are mapped. */
static uint64_t
start_in_page(const char *path)
{
    char name[256], line[128] = "";
    size_t length = strlen(path);
    int bar = path[length - 1] - '0';
    FILE *resources;

    if (length >= sizeof name || bar < 0 || bar > 5)
        return 0;
    snprintf(name, length, "%s", path); /* all but the number: .../resource */
    resources = fopen(name, "r");
    if (resources == NULL)
        err(1, "%s", name);
    for (int i = 0; i <= bar; i++)
        if (fgets(line, sizeof line, resources) == NULL)
            errx(1, "%s: no line %d", name, bar);
    fclose(resources);
    return strtoull(line, NULL, 0) % (uint64_t)sysconf(_SC_PAGESIZE);
}

int
main(int argc, char **argv)
{
    struct stat status;
    uint64_t start;
    void *memory;

    if (argc < 3)
        errx(2, "FILE r32:OFFSET or w32:OFFSET=VALUE ...");
    file = open(argv[1], O_RDWR | O_SYNC);
    if (file < 0 || fstat(file, &status) < 0)
        err(1, "%s", argv[1]);
    start = start_in_page(argv[1]);
    memory = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    mapped = memory == MAP_FAILED ? NULL : (uint8_t *)memory + start;
    for (int i = 2; i < argc; i++)
        access_(argv[i], (uint64_t)status.st_size);
    return 0;
}

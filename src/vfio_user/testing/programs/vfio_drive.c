/*
 * Drives a PCI device that is bound to vfio-pci, one step after the other:
 *
 *     vfio_drive 0000:00:03.0 "map 0x100000 0x1000" "irq msix 0 4" "write 0 0x60 4 1" "wait msix 0"
 *
 * Each argument after the device is one step; the table at the end of this file has them all. Numbers are as in C. A
 * REGION is a BAR (0 to 5), "config", or "raw": config space by sysfs, beneath vfio-pci. An INDEX is intx, msi or
 * msix. Memory is named by the IOVA where it is or was: unmapped, it can still be looked at, and mapped again.
 *
 * What steps find goes to stdout, a line each. The first one that fails ends the program with status 1 and a line on
 * stderr; every wait ends in time. Sources: the kernel's Documentation/driver-api/vfio.rst, linux/vfio.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof(*(array)))

enum { TIMEOUT_MS = 20000, QUIET_MS = 100, MAX_WORDS = 8, MAX_VECTORS = 64, MAX_BUFFERS = 16 };
enum { PAGE = 4096, MAX_MEMORY = 1 << 30 };
enum { RAW = VFIO_PCI_NUM_REGIONS, REGIONS };

typedef unsigned long long number_t;

static const char *device_name, *step_text = "open";
static int container, device;

static struct { number_t iova, size; uint8_t *memory; } buffers[MAX_BUFFERS];
static unsigned buffers_used;
static struct { number_t size, position; int fd; uint8_t *mapping; } regions[REGIONS];
static int events[VFIO_PCI_NUM_IRQS][MAX_VECTORS];

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list rest;

	fprintf(stderr, "vfio_drive: %s: ", step_text);
	va_start(rest, format);
	vfprintf(stderr, format, rest);
	va_end(rest);
	fputc('\n', stderr);
	exit(1);
}

/* The result of a system call that must not fail. */
static int must(int result, const char *what)
{
	if (result < 0)
		fail("%s: %s", what, strerror(errno));
	return result;
}

static number_t number(const char *word, number_t limit)
{
	char *end;
	number_t value;

	errno = 0;
	value = strtoull(word, &end, 0);
	if (errno || end == word || *end || value > limit)
		fail("%s is no number up to %#llx", word, limit);
	return value;
}

/* Memory. */

static uint8_t *find_memory(number_t iova, number_t size)
{
	for (unsigned i = 0; i < buffers_used; i++)
		if (iova >= buffers[i].iova && size <= buffers[i].size && iova - buffers[i].iova <= buffers[i].size - size)
			return buffers[i].memory + (iova - buffers[i].iova);
	return NULL;
}

static uint8_t *new_memory(number_t iova, number_t size)
{
	uint8_t *memory = size <= MAX_MEMORY ? aligned_alloc(PAGE, size) : NULL;

	if (!memory || buffers_used == MAX_BUFFERS)
		fail("no room for more memory");
	buffers[buffers_used].iova = iova;
	buffers[buffers_used].size = size;
	return buffers[buffers_used++].memory = memset(memory, 0, size);
}

static void step_map(char **words)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.iova = number(words[0], -1), .size = number(words[1], -1),
	};
	uint8_t *memory = find_memory(map.iova, map.size);

	map.vaddr = (uintptr_t)(memory ? memory : new_memory(map.iova, map.size));
	must(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
}

static void step_unmap(char **words)
{
	number_t size = number(words[1], -1);
	struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof(unmap), .iova = number(words[0], -1), .size = size };

	must(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap), "VFIO_IOMMU_UNMAP_DMA");
	if (unmap.size != size)
		fail("%#llx bytes were unmapped", (number_t)unmap.size);
}

/* Byte i of a seed's pattern, which does not repeat itself with the pages; that of seed 0 is zeros. */
static uint8_t pattern(number_t seed, number_t i)
{
	return seed ? (uint32_t)((seed * 0x10001 + i) * 0x9e3779b1u) >> 24 : 0;
}

/* IOVA SIZE SEED: fill this memory, or compare; which of both, the word before says. */
static void step_pattern(char **words)
{
	int fill = !strcmp(words[-1], "fill");
	number_t size = number(words[1], -1), seed = number(words[2], -1);
	uint8_t *memory = find_memory(number(words[0], -1), size);

	if (!memory)
		fail("no memory was ever mapped there");
	for (number_t i = 0; i < size; i++)
		if (fill)
			memory[i] = pattern(seed, i);
		else if (memory[i] != pattern(seed, i))
			fail("byte %#llx is %#x, not %#x", i, memory[i], pattern(seed, i));
}

/* Regions. */

static unsigned region_index(const char *word)
{
	if (!strcmp(word, "config"))
		return VFIO_PCI_CONFIG_REGION_INDEX;
	return strcmp(word, "raw") ? number(word, VFIO_PCI_BAR5_REGION_INDEX) : RAW;
}

/* One access, of exactly this width; value is read or written. The words are REGION OFFSET WIDTH. */
static void access_region(char **words, int write, number_t *value)
{
	unsigned region = region_index(words[0]);
	number_t width = number(words[2], 8), offset = number(words[1], regions[region].size - width);
	off_t position = regions[region].position + offset;
	volatile void *at = regions[region].mapping + offset;
	ssize_t done = width;

	if (!regions[region].mapping)
		done = write ? pwrite(regions[region].fd, value, width, position)
			     : pread(regions[region].fd, value, width, position);
	else if (width == 4 && write)
		*(volatile uint32_t *)at = *value;
	else if (width == 4)
		*value = *(volatile uint32_t *)at;
	else
		fail("a mapped BAR takes 4 bytes at a time");
	if (done != (ssize_t)width)
		fail("%zd bytes: %s", done, strerror(errno));
}

static number_t read_region(char **words)
{
	number_t value = 0;

	access_region(words, 0, &value);
	return value;
}

static void step_read(char **words)
{
	printf("%#llx\n", read_region(words));
}

static void step_write(char **words)
{
	number_t value = number(words[3], -1);

	access_region(words, 1, &value);
}

static void step_until(char **words)
{
	number_t mask = number(words[3], -1), wanted = number(words[4], -1), value;
	time_t end = time(NULL) + TIMEOUT_MS / 1000;

	while (((value = read_region(words)) & mask) != wanted)
		if (time(NULL) > end)
			fail("still %#llx", value);
}

static void step_mmap(char **words)
{
	unsigned bar = number(words[0], VFIO_PCI_BAR5_REGION_INDEX);
	void *mapping = mmap(NULL, regions[bar].size, PROT_READ | PROT_WRITE, MAP_SHARED, device, regions[bar].position);

	if (mapping == MAP_FAILED)
		fail("%s", strerror(errno));
	regions[bar].mapping = mapping;
}

/* Interrupts. */

static unsigned irq_index(const char *word)
{
	static const char *const names[] = { "intx", "msi", "msix" };

	for (unsigned i = 0; i < LENGTH(names); i++)
		if (!strcmp(word, names[i]))
			return i;
	fail("%s is none of intx, msi, msix", word);
}

/* SET_IRQS for the words INDEX START COUNT, with as many eventfds or with none. */
static void set_irqs(char **words, unsigned action, const int *fds)
{
	unsigned start = number(words[1], MAX_VECTORS), count = number(words[2], MAX_VECTORS - start);
	struct { struct vfio_irq_set set; int fds[MAX_VECTORS]; } request = { .set = {
		.argsz = sizeof(request.set) + (fds ? count * sizeof(*fds) : 0),
		.flags = action | (fds ? VFIO_IRQ_SET_DATA_EVENTFD : VFIO_IRQ_SET_DATA_NONE),
		.index = irq_index(words[0]), .start = start, .count = count,
	} };

	if (fds)
		memcpy(request.fds, fds, count * sizeof(*fds));
	must(ioctl(device, VFIO_DEVICE_SET_IRQS, &request), "VFIO_DEVICE_SET_IRQS");
}

static void step_irq(char **words)
{
	set_irqs(words, VFIO_IRQ_SET_ACTION_TRIGGER, events[irq_index(words[0])] + number(words[1], MAX_VECTORS));
}

static void step_silence(char **words)
{
	int none[MAX_VECTORS];

	memset(none, -1, sizeof(none));
	set_irqs(words, VFIO_IRQ_SET_ACTION_TRIGGER, none);
}

static void step_disable(char **words)
{
	set_irqs((char *[]){ words[0], "0", "0" }, VFIO_IRQ_SET_ACTION_TRIGGER, NULL);
}

static void step_mask(char **words)
{
	set_irqs(words, VFIO_IRQ_SET_ACTION_MASK, NULL);
}

static void step_unmask(char **words)
{
	set_irqs(words, VFIO_IRQ_SET_ACTION_UNMASK, NULL);
}

/* The signals of the vector INDEX VECTOR that come in time, and are taken; 0 for none. */
static uint64_t signals(char **words, int milliseconds)
{
	struct pollfd wanted = { .fd = events[irq_index(words[0])][number(words[1], MAX_VECTORS - 1)], .events = POLLIN };
	uint64_t count = 0;

	if (must(poll(&wanted, 1, milliseconds), "poll"))
		must(read(wanted.fd, &count, sizeof(count)), "read");
	return count;
}

static void step_wait(char **words)
{
	if (!signals(words, TIMEOUT_MS))
		fail("no interrupt");
}

static void step_quiet(char **words)
{
	if (signals(words, QUIET_MS))
		fail("an interrupt came");
}

static void step_interrupts(char **words)
{
	(void)words;
	fflush(stdout);
	must(system("echo interrupts; grep vfio- /proc/interrupts"), "system");
}

static void step_reset(char **words)
{
	(void)words;
	must(ioctl(device, VFIO_DEVICE_RESET), "VFIO_DEVICE_RESET");
}

/* The device. */

static int open_group(void)
{
	char link[PATH_MAX], target[PATH_MAX] = "", path[64];

	snprintf(link, sizeof(link), "/sys/bus/pci/devices/%s/iommu_group", device_name);
	must(readlink(link, target, sizeof(target) - 1), link);
	snprintf(path, sizeof(path), "/dev/vfio/%.20s", strrchr(target, '/') + 1);
	return must(open(path, O_RDWR | O_CLOEXEC), path);
}

static void open_regions(void)
{
	char path[PATH_MAX];

	for (unsigned i = 0; i < VFIO_PCI_VGA_REGION_INDEX; i++) {
		struct vfio_region_info info = { .argsz = sizeof(info), .index = i };

		must(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info), "VFIO_DEVICE_GET_REGION_INFO");
		regions[i].fd = device;
		regions[i].size = info.size;
		regions[i].position = info.offset;
	}
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", device_name);
	regions[RAW].fd = must(open(path, O_RDWR | O_CLOEXEC), path);
	regions[RAW].size = regions[VFIO_PCI_CONFIG_REGION_INDEX].size;
}

static void open_device(void)
{
	int group = open_group();

	container = must(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "/dev/vfio/vfio");
	must(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	must(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
	device = must(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device_name), "VFIO_GROUP_GET_DEVICE_FD");
	open_regions();
	for (unsigned i = 0; i < VFIO_PCI_NUM_IRQS * MAX_VECTORS; i++)
		events[i / MAX_VECTORS][i % MAX_VECTORS] = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
}

static const struct {
	const char *name, *usage;
	int words;
	void (*run)(char **words);
} steps[] = {
	{ "map", "IOVA SIZE: memory of ours, at this IOVA", 2, step_map },
	{ "unmap", "IOVA SIZE", 2, step_unmap },
	{ "fill", "IOVA SIZE SEED: memory gets a pattern", 3, step_pattern },
	{ "expect", "IOVA SIZE SEED: memory has this pattern", 3, step_pattern },
	{ "mmap", "BAR: from here on it is reached by a mapping, not by pread and pwrite", 1, step_mmap },
	{ "read", "REGION OFFSET WIDTH: print it", 3, step_read },
	{ "write", "REGION OFFSET WIDTH VALUE", 4, step_write },
	{ "until", "REGION OFFSET WIDTH MASK VALUE: wait until it reads so", 5, step_until },
	{ "irq", "INDEX START COUNT: enable these vectors", 3, step_irq },
	{ "silence", "INDEX START COUNT: take their eventfds away", 3, step_silence },
	{ "disable", "INDEX: all its vectors", 1, step_disable },
	{ "mask", "INDEX START COUNT", 3, step_mask },
	{ "unmask", "INDEX START COUNT", 3, step_unmask },
	{ "wait", "INDEX VECTOR: until an interrupt comes", 2, step_wait },
	{ "quiet", "INDEX VECTOR: none has come", 2, step_quiet },
	{ "interrupts", "print its lines of /proc/interrupts", 0, step_interrupts },
	{ "reset", "by VFIO_DEVICE_RESET", 0, step_reset },
};

static void run(char *text)
{
	char copy[256], *words[MAX_WORDS], *rest;
	int count = 0;

	step_text = text;
	snprintf(copy, sizeof(copy), "%s", text);
	while (count < MAX_WORDS && (words[count] = strtok_r(count ? NULL : copy, " ", &rest)))
		count++;
	for (unsigned i = 0; count && i < LENGTH(steps); i++)
		if (!strcmp(words[0], steps[i].name)) {
			if (count - 1 != steps[i].words)
				fail("it is %s %s", steps[i].name, steps[i].usage);
			steps[i].run(words + 1);
			return;
		}
	fail("no such step");
}

int main(int argc, char **argv)
{
	if (argc < 2)
		fail("usage: vfio_drive DEVICE STEP...");
	device_name = argv[1];
	open_device();
	for (int i = 2; i < argc; i++)
		run(argv[i]);
	return 0; /* the kernel closes the device: what is left is disabled and unmapped */
}

/*
 * Load on a block device, without the page cache: what it does in a number of seconds.
 *
 *   disk_load DEVICE random|sequential|randwrite|seqwrite BLOCK_SIZE JOBS SECONDS
 *
 * JOBS processes, each with one command at a time in flight; a sequential job has a part of the device to itself and
 * begins anew at its end. Prints the commands per second of all of them together. It writes: the device is not asked.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct job {
    const char *device;
    size_t size;
    int random, write;
    uint64_t first, blocks;
    double seconds;
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* Commands per second of one job. */
static double run(const struct job *job, uint64_t seed)
{
    int fd = open(job->device, O_RDWR | O_DIRECT);
    uint64_t done = 0;
    double begin, end;
    void *buffer;

    if (fd < 0)
        err(1, "%s", job->device);
    if (posix_memalign(&buffer, 4096, job->size))
        errx(1, "no memory");
    memset(buffer, 0x5a, job->size);
    begin = end = now();
    while (end - begin < job->seconds) {
        uint64_t block = job->first + done % job->blocks;
        ssize_t moved;

        if (job->random) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            block = job->first + (seed >> 33) % job->blocks;
        }
        moved = job->write ? pwrite(fd, buffer, job->size, block * job->size)
                           : pread(fd, buffer, job->size, block * job->size);
        if (moved != (ssize_t)job->size)
            err(1, "block %llu", (unsigned long long)block);
        done++;
        end = now();
    }
    return done / (end - begin);
}

int main(int argc, char **argv)
{
    int jobs, failed = 0, status;
    double *rates, sum = 0;
    struct job job = {0};
    off_t size;
    int fd;

    if (argc != 6)
        errx(2, "usage: disk_load DEVICE random|sequential|randwrite|seqwrite BLOCK_SIZE JOBS SECONDS");
    job.device = argv[1];
    job.random = !strncmp(argv[2], "rand", 4);
    job.write = strstr(argv[2], "write") != NULL;
    job.size = strtoul(argv[3], NULL, 10);
    jobs = atoi(argv[4]);
    job.seconds = atof(argv[5]);

    fd = open(job.device, O_RDONLY);
    size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < 0)
        err(1, "%s", job.device);
    job.blocks = size / job.size / (job.random ? 1 : jobs);
    rates = mmap(NULL, jobs * sizeof(*rates), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (rates == MAP_FAILED)
        err(1, "mmap");
    for (int i = 0; i < jobs; i++) {
        pid_t pid = fork();

        if (pid < 0)
            err(1, "fork");
        if (!pid) {
            if (!job.random)
                job.first = i * job.blocks;
            rates[i] = run(&job, i + 1);
            _exit(0);
        }
    }
    while (wait(&status) > 0)
        failed |= status;
    for (int i = 0; i < jobs; i++)
        sum += rates[i];
    printf("%.1f\n", sum);
    return !!failed;
}

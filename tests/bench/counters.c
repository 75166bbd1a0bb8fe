/* Loaded into a server that is measured: counts Python's allocations, asks callgrind for the
 * instructions, and, preloaded, slows the clock of a server that runs under callgrind: nothing that
 * it does once a second, or because a call is slow, is to be counted among its chunks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>

typedef struct {
  void *ctx;
  void *(*malloc)(void *, size_t);
  void *(*calloc)(void *, size_t, size_t);
  void *(*realloc)(void *, void *, size_t);
  void (*free)(void *, void *);
} Allocator; /* PyMemAllocatorEx */

static Allocator plain[3]; /* by domain: raw, mem, object */
static unsigned long allocations;

static void *count_malloc(void *ctx, size_t size) {
  Allocator *of = ctx;
  allocations++;
  return of->malloc(of->ctx, size);
}

static void *count_calloc(void *ctx, size_t count, size_t size) {
  Allocator *of = ctx;
  allocations++;
  return of->calloc(of->ctx, count, size);
}

static void *count_realloc(void *ctx, void *old, size_t size) {
  Allocator *of = ctx;
  allocations++;
  return of->realloc(of->ctx, old, size);
}

static void pass_free(void *ctx, void *old) {
  Allocator *of = ctx;
  of->free(of->ctx, old);
}

/* Needs the interpreter lock: the raw domain, which does not, is left alone. */
void count_allocations(void) {
  void (*get)(int, Allocator *) = dlsym(RTLD_DEFAULT, "PyMem_GetAllocator");
  void (*set)(int, Allocator *) = dlsym(RTLD_DEFAULT, "PyMem_SetAllocator");
  for (int domain = 1; domain < 3; domain++) {
    get(domain, &plain[domain]);
    Allocator counting = {&plain[domain], count_malloc, count_calloc, count_realloc, pass_free};
    set(domain, &counting);
  }
}

unsigned long read_allocations(void) { return allocations; }

enum { CLOCKS = 16, START_SLOWNESS = 50, MEASURED_SLOWNESS = 1000 };
static long slowness = 1;
static struct timespec origin[CLOCKS], shown[CLOCKS]; /* when slowness changed: real, and shown */

static int read_clock(clockid_t clock, struct timespec *time) {
  static int (*real)(clockid_t, struct timespec *);
  if (real == NULL) real = dlsym(RTLD_NEXT, "clock_gettime");
  return real(clock, time);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int status = read_clock(clock, time);
  if (status != 0 || slowness == 1 || clock < 0 || clock >= CLOCKS) return status;
  long long ns = (time->tv_sec - origin[clock].tv_sec) * 1000000000LL + time->tv_nsec - origin[clock].tv_nsec;
  ns = ns / slowness + shown[clock].tv_nsec;
  time->tv_sec = shown[clock].tv_sec + ns / 1000000000;
  time->tv_nsec = ns % 1000000000;
  return 0;
}

static void slow_down(long times) {
  for (clockid_t clock = 0; clock < CLOCKS; clock++) clock_gettime(clock, &shown[clock]);
  for (clockid_t clock = 0; clock < CLOCKS; clock++) read_clock(clock, &origin[clock]);
  slowness = times;
}

__attribute__((constructor)) static void start(void) {
  if (getenv("COUNTING_INSTRUCTIONS") != NULL) slow_down(START_SLOWNESS);
}

int epoll_pwait(int fd, struct epoll_event *events, int most, int timeout_ms, const sigset_t *mask) {
  static int (*real)(int, struct epoll_event *, int, int, const sigset_t *);
  if (real == NULL) real = dlsym(RTLD_NEXT, "epoll_pwait");
  return real(fd, events, most, timeout_ms > 0 ? timeout_ms * (int)slowness : timeout_ms, mask);
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout_ms) {
  return epoll_pwait(fd, events, most, timeout_ms, NULL);
}

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>

/* Writes what was counted since the last call, and counts on. */
void mark_instructions(void) {
  if (slowness != MEASURED_SLOWNESS) {
    slow_down(MEASURED_SLOWNESS);
    CALLGRIND_START_INSTRUMENTATION;
  }
  CALLGRIND_DUMP_STATS;
}
#endif

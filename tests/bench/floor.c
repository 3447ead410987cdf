/* What an attach costs at the least, and a client that costs next to nothing, for both sides to be measured with.
 *
 *   floor serve SOCKET                               a broker without a check, a record or a lease: the floor
 *   floor burn SOCKET                                the same, which makes a number for each device and removes it
 *   floor attach SOCKET IMAGE DIR COUNT PAUSE CLIENTS   so many clients at once, each with so many round trips
 *   floor raw IMAGE DIR COUNT PAUSE                  the bare system calls, with no broker
 *
 * `attach` and `raw` print a line for each round trip, in nanoseconds, and "failed" for one that was refused.
 * PAUSE is in microseconds, between two round trips of a client.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <linux/major.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { IMAGE, DIRECTORY, REPLY, FDS };
static const char REQUEST[] = "{\"fd\": 0, \"dir_fd\": 1, \"reply_fd\": 2}";

struct binding {
    int number, device, fds[FDS];
    char name[32];
};

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int open_or_die(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        err(1, "%s", path);
    return fd;
}

/* The numbers that `burn` makes, again and again: below those of loopd, above those that a host has. */
enum { FIRST = 2048, NUMBERS = 2048, REMOVERS = 32 };
static int remover = -1;

static int next_number(int control) {
    static int made;
    int number;
    if (remover < 0)
        return ioctl(control, LOOP_CTL_GET_FREE);
    do
        number = ioctl(control, LOOP_CTL_ADD, FIRST + made++ % NUMBERS);
    while (number < 0 && errno == EEXIST);
    return number;
}

/* Removing one is mostly a wait in the kernel, so other processes do it, many at once. */
static void start_removers(int control) {
    int number, ends[2];
    if (pipe2(ends, O_CLOEXEC))
        err(1, "pipe2");
    for (int i = 0; i < REMOVERS; i++)
        if (fork() == 0) {
            close(ends[1]);
            while (read(ends[0], &number, sizeof number) == sizeof number)
                while (ioctl(control, LOOP_CTL_REMOVE, number) < 0 && errno == EBUSY)
                    usleep(1000);
            _exit(0);
        }
    close(ends[0]);
    remover = ends[1];
}

/* The next free device, locked, bound, with a node in the directory; retried when another was faster. */
static int bind_device(int control, struct binding *binding) {
    for (int attempt = 0; attempt < 1000; attempt++) {
        struct loop_config config = {.fd = binding->fds[IMAGE], .info.lo_flags = LO_FLAGS_AUTOCLEAR};
        char path[48];
        int number = next_number(control);
        if (number < 0)
            return -1;
        binding->number = number;
        snprintf(binding->name, sizeof binding->name, "loop%d", number);
        snprintf(path, sizeof path, "/dev/%s", binding->name);
        binding->device = open(path, O_RDWR | O_CLOEXEC);
        if (binding->device < 0)
            continue;
        if (flock(binding->device, LOCK_EX | LOCK_NB) == 0 && ioctl(binding->device, LOOP_CONFIGURE, &config) == 0) {
            if (mknodat(binding->fds[DIRECTORY], binding->name, S_IFBLK | 0600, makedev(LOOP_MAJOR, number)) == 0)
                return 0;
            close(binding->device);
            break;
        }
        close(binding->device);
    }
    binding->device = -1;
    return -1;
}

static void unbind_device(struct binding *binding) {
    unlinkat(binding->fds[DIRECTORY], binding->name, 0);
    close(binding->device);
    if (remover >= 0 && write(remover, &binding->number, sizeof binding->number) < 0)
        warn("the remover");
}

union control {
    char buffer[CMSG_SPACE(FDS * sizeof(int))];
    struct cmsghdr align;
};

static int send_request(int channel, int *fds) {
    union control control = {0};
    struct iovec payload = {(void *)REQUEST, sizeof REQUEST - 1};
    struct msghdr message = {.msg_iov = &payload, .msg_iovlen = 1, .msg_control = control.buffer,
                             .msg_controllen = sizeof control.buffer};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(FDS * sizeof(int));
    memcpy(CMSG_DATA(rights), fds, FDS * sizeof(int));
    return sendmsg(channel, &message, 0);
}

static int receive_request(int channel, int *fds) {
    union control control;
    char request[4096];
    struct iovec payload = {request, sizeof request};
    struct msghdr message = {.msg_iov = &payload, .msg_iovlen = 1, .msg_control = control.buffer,
                             .msg_controllen = sizeof control.buffer};
    struct cmsghdr *rights;
    if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) < 0)
        return -1;
    rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_type != SCM_RIGHTS || rights->cmsg_len != CMSG_LEN(FDS * sizeof(int)))
        return -1;
    memcpy(fds, CMSG_DATA(rights), FDS * sizeof(int));
    return 0;
}

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    return address;
}

static void serve(const char *path, int burn) {
    struct sockaddr_un name = address(path);
    int control = open_or_die("/dev/loop-control", O_RDWR), poll = epoll_create1(EPOLL_CLOEXEC);
    int listener = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct epoll_event event = {.events = EPOLLIN};
    struct rlimit files;
    if (burn)
        start_removers(control);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (bind(listener, (struct sockaddr *)&name, sizeof name) || epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event))
        err(1, "%s", path);
    for (;;) {
        struct binding *binding;
        char reply[96];
        if (epoll_wait(poll, &event, 1, -1) != 1)
            continue;
        binding = event.data.ptr;
        if (binding) { /* the client has closed its end */
            unbind_device(binding);
            for (int i = 0; i < FDS; i++)
                close(binding->fds[i]);
            free(binding);
            continue;
        }
        binding = calloc(1, sizeof *binding);
        if (receive_request(listener, binding->fds)) {
            free(binding);
            continue;
        }
        if (bind_device(control, binding))
            snprintf(reply, sizeof reply, "{\"error\": \"\"}");
        else
            snprintf(reply, sizeof reply, "{\"devname\": \"%s\"}", binding->name);
        event = (struct epoll_event){.events = EPOLLIN | EPOLLRDHUP, .data.ptr = binding};
        epoll_ctl(poll, EPOLL_CTL_ADD, binding->fds[REPLY], &event);
        send(binding->fds[REPLY], reply, strlen(reply), MSG_NOSIGNAL);
    }
}

static void attach(const char *path, const char *image, const char *directory, int count, int pause, long long *took) {
    struct sockaddr_un name = address(path);
    int channel = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int fds[FDS] = {open_or_die(image, O_RDWR), open_or_die(directory, O_DIRECTORY)};
    if (connect(channel, (struct sockaddr *)&name, sizeof name))
        err(1, "%s", path);
    for (int i = 0; i < count; i++) {
        char reply[4096];
        int pair[2];
        ssize_t length;
        long long start = now();
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
            err(1, "socketpair");
        fds[REPLY] = pair[1];
        if (send_request(channel, fds) < 0)
            err(1, "sendmsg");
        close(pair[1]);
        length = recv(pair[0], reply, sizeof reply - 1, 0);
        took[i] = now() - start;
        reply[length > 0 ? length : 0] = '\0';
        if (!strstr(reply, "\"devname\"")) {
            fprintf(stderr, "%s: %s\n", path, length > 0 ? reply : length ? strerror(errno) : "no answer");
            took[i] = 0;
        }
        close(pair[0]);
        if (pause)
            usleep(pause);
    }
}

static void raw(const char *image, const char *directory, int count, int pause, long long *took) {
    int control = open_or_die("/dev/loop-control", O_RDWR);
    struct binding binding = {.fds = {open_or_die(image, O_RDWR), open_or_die(directory, O_DIRECTORY), -1}};
    for (int i = 0; i < count; i++) {
        long long start = now();
        int failed = bind_device(control, &binding);
        took[i] = failed ? 0 : now() - start;
        if (!failed)
            unbind_device(&binding);
        if (pause)
            usleep(pause);
    }
}

int main(int argc, char **argv) {
    long long *took;
    int count, clients = 1;
    if (argc == 3 && (!strcmp(argv[1], "serve") || !strcmp(argv[1], "burn")))
        serve(argv[2], !strcmp(argv[1], "burn"));
    if (argc != 6 && argc != 8)
        errx(2, "usage: floor serve|burn SOCKET | attach SOCKET IMAGE DIR COUNT PAUSE CLIENTS | raw IMAGE DIR COUNT PAUSE");
    count = atoi(argv[argc == 8 ? 5 : 4]);
    clients = argc == 8 ? atoi(argv[7]) : 1;
    took = mmap(NULL, sizeof *took * count * clients, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (took == MAP_FAILED)
        err(1, "mmap");
    if (argc == 6)
        raw(argv[2], argv[3], count, atoi(argv[5]), took);
    for (int i = 0; argc == 8 && i < clients; i++)
        if (fork() == 0) {
            attach(argv[2], argv[3], argv[4], count, atoi(argv[6]), took + (size_t)i * count);
            _exit(0);
        }
    while (wait(NULL) > 0)
        ;
    for (int i = 0; i < count * clients; i++)
        if (took[i])
            printf("%lld\n", took[i]);
        else
            printf("failed\n");
}

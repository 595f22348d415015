/* A FUSE file system that shows another directory, read-only: what the least costs that any
 * mount through libfuse has. Low-level API, one thread (or as many as libfuse likes), everything may
 * be kept by the kernel.
 *
 *     passthrough SOURCE MOUNTPOINT [noxattr] [threads]        (stays in the foreground)
 *
 * An inode is remembered with its path when it is first seen, and never forgotten: good enough for
 * the minutes of a bench.
 */
#define FUSE_USE_VERSION 314
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define KEEP_S 86400.0
#define BUCKETS (1 << 20)

struct node {
    struct node *next;
    ino_t number;
    char *path;
};

static struct node *buckets[BUCKETS];
static pthread_mutex_t nodes = PTHREAD_MUTEX_INITIALIZER;
static char *source;

static const char *path_of(fuse_ino_t inode)
{
    return inode == FUSE_ROOT_ID ? source : ((struct node *)inode)->path;
}

static struct node *node_of(ino_t number, const char *path)
{
    struct node **bucket = &buckets[(number * 0x9E3779B97F4A7C15ULL) >> 44 & (BUCKETS - 1)];
    for (struct node *node = *bucket; node; node = node->next)
        if (node->number == number)
            return node;
    struct node *node = malloc(sizeof *node);
    if (!node || !(node->path = strdup(path)))
        abort();
    node->number = number;
    node->next = *bucket;
    return *bucket = node;
}

static struct node *locked_node_of(ino_t number, const char *path)
{
    pthread_mutex_lock(&nodes);
    struct node *node = node_of(number, path);
    pthread_mutex_unlock(&nodes);
    return node;
}

static int look(const char *directory, const char *name, struct fuse_entry_param *entry)
{
    char path[8192];
    if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path)
        return ENAMETOOLONG;
    memset(entry, 0, sizeof *entry);
    if (lstat(path, &entry->attr))
        return errno;
    entry->ino = (fuse_ino_t)locked_node_of(entry->attr.st_ino, path);
    entry->attr_timeout = entry->entry_timeout = KEEP_S;
    return 0;
}

static void do_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry;
    int error = look(path_of(parent), name, &entry);
    if (error)
        fuse_reply_err(request, error);
    else
        fuse_reply_entry(request, &entry);
}

static void do_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    struct stat status;
    (void)info;
    if (lstat(path_of(inode), &status))
        fuse_reply_err(request, errno);
    else
        fuse_reply_attr(request, &status, KEEP_S);
}

static void do_readlink(fuse_req_t request, fuse_ino_t inode)
{
    char target[4096];
    ssize_t length = readlink(path_of(inode), target, sizeof target - 1);
    if (length < 0) {
        fuse_reply_err(request, errno);
    } else {
        target[length] = 0;
        fuse_reply_readlink(request, target);
    }
}

static void do_opendir(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    DIR *directory = opendir(path_of(inode));
    if (!directory) {
        fuse_reply_err(request, errno);
    } else {
        info->fh = (uint64_t)directory;
        fuse_reply_open(request, info);
    }
}

static void do_readdirplus(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                           struct fuse_file_info *info)
{
    DIR *directory = (DIR *)info->fh;
    char *buffer = malloc(size);
    size_t used = 0;
    if (!buffer) {
        fuse_reply_err(request, ENOMEM);
        return;
    }
    if (telldir(directory) != offset)
        seekdir(directory, offset);
    for (;;) {
        long here = telldir(directory);
        struct dirent *found = readdir(directory);
        if (!found)
            break;
        struct fuse_entry_param entry;
        if (!strcmp(found->d_name, ".") || !strcmp(found->d_name, "..")) {
            memset(&entry, 0, sizeof entry);
            entry.attr.st_ino = found->d_ino;
            entry.attr.st_mode = S_IFDIR;
        } else if (look(path_of(inode), found->d_name, &entry)) {
            continue;
        }
        size_t length = fuse_add_direntry_plus(request, buffer + used, size - used,
                                               found->d_name, &entry, telldir(directory));
        if (length > size - used) {
            seekdir(directory, here);
            break;
        }
        used += length;
    }
    fuse_reply_buf(request, buffer, used);
    free(buffer);
}

static void do_releasedir(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    closedir((DIR *)info->fh);
    fuse_reply_err(request, 0);
}

static void do_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    int fd = open(path_of(inode), info->flags & ~O_NOFOLLOW);
    if (fd < 0) {
        fuse_reply_err(request, errno);
    } else {
        info->fh = fd;
        info->keep_cache = 1;
        fuse_reply_open(request, info);
    }
}

static void do_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                    struct fuse_file_info *info)
{
    char *buffer = malloc(size);
    (void)inode;
    ssize_t length = buffer ? pread(info->fh, buffer, size, offset) : -1;
    if (length < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_buf(request, buffer, length);
    free(buffer);
}

static void do_release(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    close(info->fh);
    fuse_reply_err(request, 0);
}

static void do_getxattr(fuse_req_t request, fuse_ino_t inode, const char *name, size_t size)
{
    char value[65536];
    ssize_t length = lgetxattr(path_of(inode), name, value, size < sizeof value ? size : sizeof value);
    if (length < 0)
        fuse_reply_err(request, errno);
    else if (size == 0)
        fuse_reply_xattr(request, length);
    else
        fuse_reply_buf(request, value, length);
}

static struct fuse_lowlevel_ops operations = {
    .lookup = do_lookup,
    .getattr = do_getattr,
    .readlink = do_readlink,
    .opendir = do_opendir,
    .readdirplus = do_readdirplus,
    .releasedir = do_releasedir,
    .open = do_open,
    .read = do_read,
    .release = do_release,
    .getxattr = do_getxattr,
};

int main(int count, char **words)
{
    int threads = 0;
    if (count < 3 || !(source = realpath(words[1], NULL))) {
        fprintf(stderr, "usage: passthrough SOURCE MOUNTPOINT [noxattr] [threads]\n");
        return 2;
    }
    for (int index = 3; index < count; index++) {
        if (!strcmp(words[index], "noxattr"))
            operations.getxattr = NULL;
        if (!strcmp(words[index], "threads"))
            threads = 1;
    }
    char *options[] = {words[0], "-oro,fsname=passthrough,auto_unmount"};
    struct fuse_args arguments = FUSE_ARGS_INIT(2, options);
    struct fuse_session *session =
        fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, words[2]))
        return 1;
    int result = threads ? fuse_session_loop_mt(session, NULL) : fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return result ? 1 : 0;
}

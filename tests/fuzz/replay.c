/* Runs inputs of the fuzzer again: `replay FILE-OR-DIRECTORY...`. In place of the fuzzing engine, so that any
 * compiler builds it. It ends with 0, or it is aborted. */
#include <dirent.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_BYTES = 1 << 20 };

static int count;
static const char *running;

/* Says which input it was. The signal comes back, and ends the program. */
static void tell(int number)
{
    if (write(STDERR_FILENO, running, strlen(running)) > 0 && write(STDERR_FILENO, "\n", 1) > 0)
        signal(number, SIG_DFL);
}

static int replay_file(const char *path)
{
    static uint8_t data[MAX_BYTES];
    FILE *file = fopen(path, "rb");
    size_t size;

    if (!file) {
        perror(path);
        return 1;
    }
    size = fread(data, 1, sizeof(data), file);
    fclose(file);
    running = path;
    LLVMFuzzerTestOneInput(data, size);
    count++;
    return 0;
}

static int replay_directory(const char *path, DIR *directory)
{
    struct dirent *entry;
    char name[4096];
    int failed = 0;

    while ((entry = readdir(directory))) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
        failed |= replay_file(name);
    }
    closedir(directory);
    return failed;
}

int main(int argc, char **argv)
{
    int failed = 0;

    signal(SIGABRT, tell);
    for (int i = 1; i < argc; i++) {
        DIR *directory = opendir(argv[i]);

        failed |= directory ? replay_directory(argv[i], directory) : replay_file(argv[i]);
    }
    printf("%d inputs\n", count);
    return failed || !count;
}

"""Static libraries that stand in for those of CUDA when linking: cuda-standins.py CUDARC FOLDER.

candle 0.11 links libcuda, libcublas, libcublasLt, libcurand and libnvrtc, and a program linked to
them does not start where they are missing (candle issues 3208, 3900). Here every function that the
Rust bindings (the sources of cudarc, in CUDARC) declare is a jump through a table. The first call
looks the function up in the real library (dlopen, dlsym); where that is missing, the call returns
the error that says so. x86-64 only.
"""

import pathlib
import re
import subprocess
import sys

# Module of cudarc: library, its names at run time, and the status that a call returns without it.
LIBRARIES = {
    "driver": ("cuda", ["libcuda.so.1"], 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("cublas", ["libcublas.so.13", "libcublas.so.12"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublaslt": ("cublasLt", ["libcublasLt.so.13", "libcublasLt.so.12"], 1),  # the same
    "curand": ("curand", ["libcurand.so.10"], 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nccl": ("nccl", ["libnccl.so.2"], 2),  # ncclSystemError
    "nvrtc": ("nvrtc", ["libnvrtc.so.13", "libnvrtc.so.12"], 7),  # NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
}

DECLARATION = re.compile(r"pub (?:unsafe )?fn ((?:cu|nvrtc|nccl)\w+)\s*\([^;{]*?\)\s*(->\s*[^;{]+)?[;{]")

HEAD = r"""
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#define COUNT @count@
#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN void *standin_@lib@_table[COUNT];
static const char *const functions[COUNT] = {@functions@};
/* Whether a function returns text instead of a status. */
static const char text[COUNT] = {@text@};
static const char *const files[] = {@files@};

static void *library;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void open_library(void) {
    for (unsigned i = 0; !library && i < sizeof files / sizeof *files; ++i)
        library = dlopen(files[i], RTLD_NOW | RTLD_GLOBAL);
    if (!library && @loud@)
        fprintf(stderr, "note: %s cannot be loaded (%s); is its folder in LD_LIBRARY_PATH?\n", files[0], dlerror());
}
static long no_status(void) { return @status@; }
static const char *no_text(void) { return "@file@ is missing"; }

HIDDEN void *standin_@lib@_find(unsigned long at) {
    pthread_once(&once, open_library);
    void *found = library ? dlsym(library, functions[at]) : 0;
    if (!found)
        found = text[at] ? (void *)no_text : (void *)no_status;
    __atomic_store_n(&standin_@lib@_table[at], found, __ATOMIC_RELEASE);
    return found;
}

/* First call: every register that may carry an argument is kept while the function is looked up. */
__asm__(
    ".text\n.type standin_@lib@_first,@function\nstandin_@lib@_first:\n"
    "push %rdi\npush %rsi\npush %rdx\npush %rcx\npush %r8\npush %r9\npush %rax\nsub $128,%rsp\n"
    "movups %xmm0,(%rsp)\nmovups %xmm1,16(%rsp)\nmovups %xmm2,32(%rsp)\nmovups %xmm3,48(%rsp)\n"
    "movups %xmm4,64(%rsp)\nmovups %xmm5,80(%rsp)\nmovups %xmm6,96(%rsp)\nmovups %xmm7,112(%rsp)\n"
    "mov %r11,%rdi\ncall standin_@lib@_find\nmov %rax,%r11\n"
    "movups (%rsp),%xmm0\nmovups 16(%rsp),%xmm1\nmovups 32(%rsp),%xmm2\nmovups 48(%rsp),%xmm3\n"
    "movups 64(%rsp),%xmm4\nmovups 80(%rsp),%xmm5\nmovups 96(%rsp),%xmm6\nmovups 112(%rsp),%xmm7\n"
    "add $128,%rsp\npop %rax\npop %r9\npop %r8\npop %rcx\npop %rdx\npop %rsi\npop %rdi\njmp *%r11\n");
"""

# The table is filled with the address when known, and empty before.
ENTRY = (
    '__asm__(".globl @name@\\n.type @name@,@function\\n@name@:\\n'
    "mov standin_@lib@_table+@offset@(%rip),%r11\\ntest %r11,%r11\\njz 1f\\njmp *%r11\\n"
    '1: mov $@index@,%r11d\\njmp standin_@lib@_first\\n");\n'
)


def fill(template, **values):
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value))
    return template


def source(bindings, lib, files, status):
    declared = {name: result or "" for name, result in DECLARATION.findall(bindings)}
    declared.pop("culib", None)
    names = sorted(declared)
    if not names:
        sys.exit(f"error: no function of {lib} found; has cudarc changed its bindings?")
    quoted = lambda words: ", ".join(f'"{word}"' for word in words)
    head = fill(
        HEAD,
        count=len(names),
        functions=quoted(names),
        text=", ".join("1" if "c_char" in declared[name] else "0" for name in names),
        files=quoted(files),
        file=files[0],
        status=status,
        loud=int(lib != "cuda"),  # a machine without a driver is no news
        lib=lib,
    )
    entries = (fill(ENTRY, name=n, lib=lib, offset=8 * i, index=i) for i, n in enumerate(names))
    return head + "".join(entries), len(names)


def main():
    cudarc, folder = map(pathlib.Path, sys.argv[1:3])
    for module, (lib, files, status) in LIBRARIES.items():
        bindings = (cudarc / "src" / module / "sys" / "mod.rs").read_text()
        text, count = source(bindings, lib, files, status)
        c, o, a = (folder / f"{stem}" for stem in (f"{lib}.c", f"{lib}.o", f"lib{lib}.a"))
        if a.exists() and c.exists() and c.read_text() == text:
            continue
        c.write_text(text)
        subprocess.check_call(["cc", "-O1", "-fPIC", "-c", c, "-o", o])
        a.unlink(missing_ok=True)
        subprocess.check_call(["ar", "rcs", a, o])
        print(f"stand-in for lib{lib}: {count} functions", file=sys.stderr)


if __name__ == "__main__":
    main()

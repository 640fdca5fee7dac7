"""What a process that reads hostile files may still do: compute within a bound of memory, and talk to the process that made it.

The system calls that decoding needs are listed. Every other fails with EPERM: no file is opened, no socket made, no program or
thread started, no signal sent. So code that a file smuggles in can return wrong pixels, and not much else.
"""

import ctypes
import errno
import platform
import resource
import struct
from contextlib import suppress
from pathlib import Path

_X86_64 = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "exit": 60, "fcntl": 72,
    "getrusage": 98, "sysinfo": 99, "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
    "restart_syscall": 219, "clock_gettime": 228, "exit_group": 231, "newfstatat": 262, "ppoll": 271, "getrandom": 318,
    "rseq": 334,
}  # fmt: skip
_AARCH64 = {
    "fcntl": 25, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "ppoll": 73,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "clock_gettime": 113, "sched_getaffinity": 123,
    "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getrusage": 165,
    "getpid": 172, "gettid": 178, "sysinfo": 179, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212, "brk": 214,
    "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "rseq": 293,
}  # fmt: skip
"""The system calls of a process that decodes, by their numbers: Linux, arch/x86/entry/syscalls, include/uapi/asm-generic."""

_MACHINES = {"x86_64": (0xC000_003E, 317, _X86_64), "aarch64": (0xC000_00B7, 277, _AARCH64)}
"""Machine -> the kernel's code for it (linux/audit.h), the number of seccomp(2), the calls that are allowed."""

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF: load a word, compare and jump, return
_NUMBER_AT, _MACHINE_AT = 0, 4  # in struct seccomp_data
_ALLOW, _FAIL = 0x7FFF_0000, 0x0005_0000 | errno.EPERM
_NO_NEW_PRIVILEGES, _SET_FILTER, _ALL_THREADS = 38, 1, 1
_NEW_USER, _NEW_NET = 0x1000_0000, 0x4000_0000

OPEN_FILES = 16


def confine(memory_bytes: int) -> str:
    """Confines this process for good, once it has loaded all that it needs. Returns what keeps it from network and files:
    "seccomp"; "network namespace", which does not keep it from files; or "" where the system has neither.

    memory_bytes: of address space, beyond what the process has now.
    """
    for limit, value in (
        (resource.RLIMIT_CORE, 0),  # a core dump would hold a caller's file
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_AS, _address_space() + memory_bytes),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and refuses it
            resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    if platform.system() != "Linux":
        return ""
    if _filter_calls(libc):
        return "seccomp"
    return "network namespace" if libc.unshare(_NEW_USER | _NEW_NET) == 0 else ""


def _address_space() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Installs the list for all threads, with seccomp(2). False where the kernel does not have it."""
    if platform.machine() not in _MACHINES:
        return False
    machine, seccomp, calls = _MACHINES[platform.machine()]
    numbers = sorted(calls.values())
    refuse = len(numbers)  # jumps are counted from the next instruction
    program = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 0, refuse + 1, machine), (_LOAD, 0, 0, _NUMBER_AT)]
    program += [(_EQUAL, refuse - place, 0, number) for place, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _FAIL), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))  # struct sock_fprog
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.syscall(seccomp, _SET_FILTER, _ALL_THREADS, ctypes.byref(fprog)) == 0)

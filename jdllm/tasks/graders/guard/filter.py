"""A seccomp filter: the system calls that no program under test needs, refused by the kernel.

It cannot be taken off again, and holds for every thread. Numbers are those of x86-64 and arm64.
"""

import ctypes
import errno
import os
import struct

# Machine -> its number for audits (the kernel's check that the table fits), its column below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
UNKNOWN = 452  # calls from here on are younger than this table; C libraries do without them
X32 = 0x40000000  # x86-64 has a second set of numbers for its calls

# name: (x86-64, arm64), None where a machine lacks it.
REFUSED = {
    # other processes, other programs
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    # looking into and changing other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the network, and what outlives a process
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # mounts, namespaces, the kernel
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "personality": (135, 92),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
    # facts about files, which Landlock leaves open
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),
}
# What changes files by name, for the sandbox that has nothing else to keep them.
CHANGES = {
    "creat": (85, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
MISSING = {"clone3": (435, 435), "openat2": (437, 437)}  # the C library has an older way for these

CLONE_THREAD = 0x10000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# fcntl's and ioctl's ways to have signals sent to others, ioctl's to type into a terminal.
OWNERS = (8, 10, 15)
OWNERS_BY_IOCTL = (0x8901, 0x8902, 0x5412, 0x541C)
PR_SET_PDEATHSIG = 1

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def _conditions(
    pids: set[int], writes: bool
) -> list[tuple[tuple, int, int, tuple[int, ...], bool]]:
    """Returns refusals by argument: call numbers, which argument, the test, its values.

    A call is refused where the test holds for any of the values.
    """
    found = [
        ((56, 220), 0, _ANY_BIT, (CLONE_THREAD,), False),  # clone
        ((62, 129), 0, _EQUAL, (*pids,), False),  # kill
        ((234, 131), 0, _EQUAL, (*pids,), False),  # tgkill
        ((302, 261), 0, _EQUAL, (0, *pids), False),  # prlimit64
        ((157, 167), 0, _EQUAL, (PR_SET_PDEATHSIG,), True),  # prctl
        ((72, 25), 1, _EQUAL, OWNERS, True),  # fcntl
        ((16, 29), 1, _EQUAL, OWNERS_BY_IOCTL, True),  # ioctl
    ]
    if not writes:
        found += [((2, None), 1, _ANY_BIT, (WRITES,), True)]  # open
        found += [((257, 56), 2, _ANY_BIT, (WRITES,), True)]  # openat
    return found


def program(machine: str, pids: set[int], writes: bool) -> bytes:
    """Returns the filter in the kernel's format of 8 bytes per step; signals go to `pids` only.

    Without `writes` no file is opened for writing or changed by its name. KeyError for a machine
    that has no numbers here.
    """
    audit, column = MACHINES[machine]
    step = struct.Struct("=HBBI").pack
    refuse, lack = (step(_RETURN, 0, 0, _ERROR | e) for e in (errno.EPERM, errno.ENOSYS))
    steps = [step(_LOAD, 0, 0, 4), step(_EQUAL, 1, 0, audit), refuse, step(_LOAD, 0, 0, 0)]
    steps += [step(_AT_LEAST, 0, 1, UNKNOWN), lack]  # X32 is beyond them too
    for table, answer in ((REFUSED | ({} if writes else CHANGES), refuse), (MISSING, lack)):
        for numbers in table.values():
            if numbers[column] is not None:
                steps += [step(_EQUAL, 0, 1, numbers[column]), answer]
    for numbers, which, test, values, holds in _conditions(pids, writes):
        if numbers[column] is None:
            continue
        last = len(values)  # each test jumps over those behind it, and over the first answer
        tests = [step(test, last - i, 0, value) for i, value in enumerate(values)]
        allow = step(_RETURN, 0, 0, _ALLOW)
        answers = [allow, refuse] if holds else [refuse, allow]
        steps.append(step(_EQUAL, 0, len(tests) + 3, numbers[column]))
        steps += [step(_LOAD, 0, 0, 16 + 8 * which), *tests, *answers]
    return b"".join([*steps, step(_RETURN, 0, 0, _ALLOW)])


def install(pids: set[int], writes: bool) -> None:
    """Filters this process's system calls from now on. Raises OSError where that fails."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"{machine} has no table of system calls here")
    steps = program(machine, pids, writes)
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(steps)
    head = struct.pack("@HP", len(steps) // 8, ctypes.addressof(held))
    pr_set_seccomp, mode_filter = 22, 2
    if libc.prctl(pr_set_seccomp, mode_filter, ctypes.c_char_p(head), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")

"""A filter of system calls for bubblewrap's `--seccomp`: what a program that computes never asks for is refused.

Classic BPF, written out: one check of the architecture, one comparison a call. Refused calls give EPERM; `clone3`, whose flags a
filter cannot read, gives ENOSYS, and glibc then takes `clone`.
"""

import platform
import struct

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* flags; CLONE_NEWTIME shares its bit with none that clone takes
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

# name: (x86_64, aarch64); None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "memfd_create": (319, 279),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "unshare": (272, 97), "setns": (308, 268), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "personality": (135, 92), "syslog": (103, 116),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "flock": (73, 32), "sync": (162, 81), "syncfs": (306, 267),  # which reach beyond the sandbox: shared files, the host's disks
    "sethostname": (170, 161), "setdomainname": (171, 162), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "modify_ldt": (154, None), "ioperm": (173, None), "iopl": (172, None), "uselib": (134, None), "memfd_secret": (447, 447),
}  # fmt: skip
CLONE, CLONE3, PRCTL = (56, 220), (435, 435), (157, 167)
PR_SET_PDEATHSIG = 1  # by which a program would outlive the one that started it
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # x86_64 calls by their second numbers


def filter_of(machine: str | None = None) -> bytes:
    """The program, as the kernel reads it. Raises KeyError for a machine that it is not written for."""
    column, audit = ARCHITECTURES[machine or platform.machine()]
    numbers = [each[column] for each in REFUSED.values()]
    steps = [_step(LOAD, 4), _step(EQUAL, audit, 1, 0), _step(RETURN, KILL), _step(LOAD, 0)]
    if column == 0:
        steps += [_step(AT_LEAST, X32, 0, 1), _step(RETURN, ERRNO | EPERM)]
    for number in numbers:
        if number is not None:
            steps += [_step(EQUAL, number, 0, 1), _step(RETURN, ERRNO | EPERM)]
    steps += [_step(EQUAL, CLONE3[column], 0, 1), _step(RETURN, ERRNO | ENOSYS)]
    steps += [_step(EQUAL, CLONE[column], 0, 3), _step(LOAD, 16), _step(ANY_BIT, NEW_NAMESPACES, 0, 1)]
    steps += [_step(RETURN, ERRNO | EPERM), _step(LOAD, 0), _step(EQUAL, PRCTL[column], 0, 3), _step(LOAD, 16)]
    steps += [_step(EQUAL, PR_SET_PDEATHSIG, 0, 1), _step(RETURN, ERRNO | EPERM)]
    return b"".join([*steps, _step(RETURN, ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)

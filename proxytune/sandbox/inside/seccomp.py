"""The system calls that model-written code may not make, as a seccomp filter in the kernel's own bytes
(classic BPF): no compiler and no library is needed.

It is a list of what is refused, with EPERM, and the rest is allowed: code may need any library. Refused is
what makes a namespace or mounts, looks into another process, loads code into the kernel, or keeps memory
that no process holds. Manual pages: seccomp(2), bpf(2).
"""

from __future__ import annotations

import platform
import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> its number in the kernel's audit, and its column in the tables below."""
EPERM, ENOSYS = 1, 38
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
X32 = 0x40000000

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # namespaces, mounts, another root
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # parts of the kernel that few programs need and many attacks do
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    "modify_ldt": (154, None), "lookup_dcookie": (212, 18), "syslog": (103, 116),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "vhangup": (153, 58),
    # memory that no process holds: it would outlive a program and count for none
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193),
    "semtimedop": (220, 192), "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
UNKNOWN: dict[str, tuple[int | None, int | None]] = {"clone3": (435, 435)}
"""Refused with ENOSYS: its flags lie in memory, where a filter cannot look. Libraries fall back to clone."""
CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "unshare": (272, 97), "clone": (56, 220), "socket": (41, 198), "ioctl": (16, 29), "fcntl": (72, 25),
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
}  # fmt: skip
SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}  # fmt: skip
"""Refused where processes that are not ours can be seen."""
NEW_NAMESPACE = 0x7E020000
"""CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET."""
TERMINAL = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: typing into a terminal."""
SIGNAL_IOCTLS, SIGNAL_FCNTLS = (0x8901, 0x8902), (8, 10, 15)
"""FIOSETOWN, SIOCSPGRP; F_SETOWN, F_SETSIG, F_SETOWN_EX: the kernel sends a signal on a program's behalf."""
FAMILIES = (1, 2, 10, 16)
"""Unix, IPv4, IPv6 and netlink. Another one (VSOCK) may know no network namespace."""


def missing(machine: str = "") -> str:
    """Why there is no filter for this machine, or ""."""
    machine = machine or platform.machine()
    known = ", ".join(ARCHITECTURES)
    return "" if machine in ARCHITECTURES else f"no filter of system calls for '{machine}' (only {known})"


def filter_bytes(only_process: int = 0, machine: str = "") -> bytes:
    """The filter. With `only_process`, for `weak`: no sockets, and no signal to another process."""
    audit, column = ARCHITECTURES[machine or platform.machine()]
    code = [_load(ARCHITECTURE), _jump(EQUAL, audit, 1, 0), _refuse(ENOSYS), _load(NUMBER)]
    code += [_jump(AT_LEAST, X32, 0, 1), _refuse(ENOSYS)] if column == 0 else []
    refused = {**REFUSED, **SIGNALS} if only_process else REFUSED
    for numbers, error in ((refused, EPERM), (UNKNOWN, ENOSYS)):
        for number in (pair[column] for pair in numbers.values()):
            code += [] if number is None else [_jump(EQUAL, number, 0, 1), _refuse(error)]
    for name, rule in _conditions(only_process).items():
        number = CONDITIONAL[name][column]
        assert number is not None
        code += [_jump(EQUAL, number, 0, len(rule)), *rule]
    return b"".join([*code, _return(ALLOW)])


def _conditions(only_process: int) -> dict[str, list[bytes]]:
    """What decides on a call by its arguments. Each ends in a return."""
    new = [_jump(ANY_BIT, NEW_NAMESPACE, 0, 1), _refuse(EPERM), _return(ALLOW)]
    found = {"unshare": [_argument(0), *new], "clone": [_argument(0), *new]}
    found["ioctl"] = _none_of(1, TERMINAL + (SIGNAL_IOCTLS if only_process else ()))
    if not only_process:
        return {**found, "socket": _one_of(0, FAMILIES)}
    found["fcntl"] = _none_of(1, SIGNAL_FCNTLS)
    found["socket"] = [_refuse(EPERM)]
    found["prlimit64"] = _one_of(0, (0, only_process))
    return {**found, "kill": _one_of(0, (only_process,)), "tgkill": _one_of(0, (only_process,))}


def _one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow some values of an argument only."""
    tests = [_jump(EQUAL, value, len(values) - at, 0) for at, value in enumerate(values)]
    return [_argument(argument), *tests, _refuse(EPERM), _return(ALLOW)]


def _none_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Refuse some values of an argument."""
    tests = [_jump(EQUAL, value, len(values) - at, 0) for at, value in enumerate(values)]
    return [_argument(argument), *tests, _return(ALLOW), _refuse(EPERM)]


def _jump(test: int, value: int, then: int, otherwise: int) -> bytes:
    return struct.pack("=HBBI", test, then, otherwise, value)


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", LOAD, 0, 0, offset)


def _argument(index: int) -> bytes:
    """The low half of an argument: what is tested has 32 bits, and the kernel drops the rest."""
    return _load(ARGUMENTS + 8 * index)


def _return(value: int) -> bytes:
    return struct.pack("=HBBI", RETURN, 0, 0, value)


def _refuse(error: int) -> bytes:
    return _return(REFUSE | error)

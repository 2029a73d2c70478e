"""Tries what must not work; writes a JSON list of what did.

A script of the standard library alone. The sandbox runs it as a program, with a line behind it that
calls `main` or `leave_daemon`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any


def connect(port: int) -> None:
    """Reaches a server outside."""
    socket.create_connection(("127.0.0.1", port), timeout=2).close()


def read_file(path: str) -> None:
    """Reads a file outside."""
    with open(path, "rb") as file:
        file.read()


def list_folder(path: str, device: int, inode: int) -> None:
    """Lists a directory, if it is the one outside and not another of that name."""
    os.listdir(path)
    found = os.stat(path)
    if (found.st_dev, found.st_ino) != (device, inode):
        raise FileNotFoundError(path)


def write_in(folder: str) -> None:
    """Makes a file."""
    path = os.path.join(folder, "optiq-probe")
    with open(path, "wb"):
        os.remove(path)


def fill_memory(size_bytes: int) -> None:
    """Takes too much memory."""
    bytearray(size_bytes + 1)


def write_large_file(size_bytes: int) -> None:
    """Makes too large a file."""
    with open("large", "wb") as file:
        file.truncate(size_bytes + 1)


def open_many_files(number: int) -> None:
    """Opens too many files."""
    files = []
    try:
        for _ in range(number + 1):
            files.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for file in files:
            os.close(file)


def fork_many(number: int) -> None:
    """Has too many children at a time."""
    read_end, write_end = os.pipe()
    children = []
    try:
        for _ in range(number + 1):
            child = os.fork()
            if child == 0:
                os.close(write_end)
                os.read(read_end, 1)
                os._exit(0)
            children.append(child)
    finally:
        os.close(write_end)
        os.close(read_end)
        for child in children:
            os.waitpid(child, 0)


def use_inherited_files(highest: int) -> None:
    """Finds a file that came from outside, other than the pipe that is told of the end."""
    found = 0
    for number in range(3, highest):
        try:
            os.fstat(number)
        except OSError:
            continue
        found += 1
    if found <= 1:
        raise FileNotFoundError


def find_files() -> None:
    """Finds something in the working directory."""
    if not os.listdir("."):
        raise FileNotFoundError


def leave_daemon() -> None:
    """Leaves a process that holds the output open, out of the group where that works."""
    read_end, write_end = os.pipe()
    try:
        child = os.fork()
    except OSError:
        return
    if child == 0:
        try:
            os.setsid()
        finally:
            os.write(write_end, b"!")
            time.sleep(20)
            os._exit(0)
    os.read(read_end, 1)


def attempts(values: dict[str, Any]) -> list[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """What is tried: the wall, the attempt and its arguments."""
    return [
        ("an empty directory", find_files, ()),
        ("no inherited files", use_inherited_files, (values["open_files"],)),
        ("no network", connect, (values["port"],)),
        ("files of others hidden", read_file, (values["canary"],)),
        *((f"{place[0]} hidden", list_folder, tuple(place)) for place in values["places"]),
        *((f"no writing in {folder}", write_in, (folder,)) for folder in values["writable"]),
        ("a limit of memory", fill_memory, (values["memory_bytes"],)),
        ("a limit of file size", write_large_file, (values["file_bytes"],)),
        ("a limit of open files", open_many_files, (values["open_files"],)),
        ("a limit of processes", fork_many, (values["processes"],)),
        ("a user without rights", os.setuid, (0,)),
    ]


def main(values: dict[str, Any]) -> None:
    """Writes the names of the walls that are missing."""
    missing = []
    for wall, attempt, arguments in attempts(values):
        try:
            attempt(*arguments)
        except (OSError, MemoryError):
            continue
        missing.append(wall)
    sys.stdout.write(json.dumps(missing))

"""The guest's kernel: a stock distribution image with rdma_rxe, its modules, and an initramfs of our making.

Everything lives in one cache directory per kernel version, built aside and renamed into place when whole.
The initramfs holds a static busybox, guest-init.sh and the modules in the order in which they are loaded;
what differs from run to run is appended as a second archive (the kernel unpacks several in a row).
"""

from __future__ import annotations

import hashlib
import lzma
import platform
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.rxe import packages
from tools.rxe.common import RxeError, call_or_fail, find_program, locked, say, scratch_dir, write_atomically

META_PACKAGE = "linux-image-amd64"  # not the cloud flavour: it lacks rdma_rxe
BUSYBOX_PACKAGE = "busybox-static"
INIT_SCRIPT = Path(__file__).with_name("guest-init.sh")

# virtio first, for the guest's file system and channel; then the device itself.
BOOT_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "9pnet_virtio", "9p", "overlay")
RDMA_MODULES = ("dummy", "crc32_generic", "ib_uverbs", "rdma_ucm", "rdma_rxe")
MODULE_OPTIONS = {"dummy": "numdummies=0"}
# Of 390 MB of modules nobody needs sound or graphics here.
KEPT_MODULES = (
    *("arch", "block", "crypto", "lib", "mm", "net"),
    *("fs/9p", "fs/configfs", "fs/fscache", "fs/fuse", "fs/netfs", "fs/overlayfs"),
    *("drivers/block", "drivers/char", "drivers/infiniband", "drivers/virtio"),
    *("drivers/net/dummy.ko", "drivers/net/tun.ko", "drivers/net/veth.ko"),
    *("drivers/net/net_failover.ko", "drivers/net/virtio_net.ko"),
)
COMPRESSED = {".xz": lzma.decompress, ".gz": lambda data: zlib.decompress(data, wbits=31)}


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot: its release name, image, initramfs and the root of its modules."""

    release: str
    image: Path
    initramfs: Path
    modules: Path


def ready_kernel(cache: Path) -> Kernel:
    """The cached kernel, fetched first when there is none."""
    directory = newest_cached(cache)
    if directory is None:
        if platform.machine() != "x86_64":
            raise RxeError(f"the virtual machine is for x86_64 only, this is {platform.machine()}")
        with locked(cache / "lock"):
            directory = newest_cached(cache) or fetch(cache)
    release = directory.name.removeprefix("kernel-")
    modules = directory / "lib/modules" / release
    return Kernel(release, directory / "image", initramfs(directory, modules), modules)


def newest_cached(cache: Path) -> Path | None:
    return max(cache.glob("kernel-*"), key=lambda path: path.stat().st_mtime, default=None)


def fetch(cache: Path) -> Path:
    """Fetch by the package lists that are there; when they are missing or out of date, by fresh ones."""
    for abandoned in cache.glob(".partial-*"):  # we hold the lock: nobody is at work on these
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        return fetch_listed(cache)
    except RxeError as error:
        say(str(error))
        packages.refresh_lists()
        return fetch_listed(cache)


def fetch_listed(cache: Path) -> Path:
    package = packages.newest_kernel_package(META_PACKAGE)
    with scratch_dir(cache) as scratch:
        say(f"fetching {BUSYBOX_PACKAGE} and {package} (70 MB, once)")
        (scratch / "busybox").mkdir()
        packages.unpack(BUSYBOX_PACKAGE, scratch / "busybox")
        (scratch / "kernel").mkdir()
        packages.unpack(package, scratch / "kernel")
        say("unpacking the kernel")
        release = assemble(scratch)
        destination = cache / f"kernel-{release}"
        (scratch / "ready").rename(destination)
    return destination


def assemble(scratch: Path) -> str:
    """Put image, busybox and the modules worth keeping below scratch/ready; return the kernel's release."""
    (compressed,) = (scratch / "kernel/boot").glob("vmlinuz-*")
    release = compressed.name.removeprefix("vmlinuz-")
    ready = scratch / "ready"
    ready.mkdir()
    (ready / "image").write_bytes(uncompressed_image(compressed.read_bytes()))
    shutil.copy2(next((scratch / "busybox").glob("**/bin/busybox")), ready / "busybox")
    # /lib is /usr/lib in newer packages
    source = next(path for path in (scratch / "kernel").glob("**/modules/*") if path.name == release)
    modules = ready / "lib/modules" / release
    shutil.move(source, modules)
    prune(modules / "kernel")
    depmod = find_program("depmod")
    if depmod is None:
        raise RxeError("no depmod here: apt-get install kmod")
    call_or_fail([depmod, "-b", str(ready), release], "depmod")
    return release


def prune(tree: Path) -> None:
    kept = [tree / name for name in KEPT_MODULES]
    for module in [path for path in tree.glob("**/*.ko*") if path.is_file()]:
        plain = module.with_name(module.name.split(".ko")[0] + ".ko")
        if not any(plain.is_relative_to(keep) for keep in kept):
            module.unlink()


def uncompressed_image(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, which QEMU boots directly; the image itself if packed in another way.

    Unpacking here takes half a second; an emulated machine would take several at every boot.  Offsets are
    from the x86 boot protocol (Documentation/arch/x86/boot.rst): setup_sects, payload_offset and _length.
    """
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    try:
        if payload.startswith(b"\xfd7zXZ\0"):  # the size of the kernel follows the archive
            return lzma.LZMADecompressor().decompress(payload)
        if payload.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(wbits=31).decompress(payload)
    except (lzma.LZMAError, zlib.error):
        pass
    return image


def initramfs(directory: Path, modules: Path) -> Path:
    """The part of the initramfs that is the same for all runs, rebuilt when its recipe changed."""
    recipe = INIT_SCRIPT.read_bytes() + Path(__file__).read_bytes()
    path = directory / f"initramfs-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if not path.exists():
        for old in directory.glob("initramfs-*"):
            old.unlink(missing_ok=True)
        write_atomically(path, build_initramfs(directory / "busybox", modules))
    return path


def build_initramfs(busybox: Path, modules: Path) -> bytes:
    files = {"bin/busybox": busybox.read_bytes(), "init": INIT_SCRIPT.read_bytes()}
    order = []
    for module in load_order(modules, BOOT_MODULES + RDMA_MODULES):
        name = module_name(module)
        files[f"modules/{name}"] = COMPRESSED.get(Path(module).suffix, bytes)((modules / module).read_bytes())
        order.append(f"{name} {MODULE_OPTIONS.get(name, '')}\n")
    files["modules.order"] = "".join(order).encode()
    return archive(files, directories=("bin", "dev", "proc", "sys", "modules", "lower", "upper", "root"))


def module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def load_order(modules: Path, wanted: Iterable[str]) -> list[str]:
    """Paths of the wanted modules and what they need, each after what it depends on (modules.dep)."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text(encoding="ascii").splitlines():
        module, _, dependencies = line.partition(":")
        needs[module] = dependencies.split()
    paths = {module_name(module): module for module in needs}
    order: dict[str, None] = {}
    for name in wanted:
        if name not in paths:
            raise RxeError(f"the kernel package has no module {name}")
        # modules.dep lists everything a module needs, the deepest last
        for module in [*reversed(needs[paths[name]]), paths[name]]:
            order.setdefault(module)
    return list(order)


def archive(files: Mapping[str, bytes], directories: Iterable[str] = ()) -> bytes:
    """A cpio archive in the kernel's "newc" format; every file is executable, which does no harm here."""
    entries = [(name, 0o40755, b"") for name in directories]
    entries += [(name, 0o100755, data) for name, data in files.items()]
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields)
        out += path + bytes(-(len(out) + len(path)) % 4)
        out += data + bytes(-len(data) % 4)
    return bytes(out)

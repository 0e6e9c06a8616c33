"""A Linux kernel with an active soft-RoCE (rdma_rxe) device for any command: ``python3 -m tools.rxe``.

Theory of operation, in the order in which ``run`` goes about it:

1. *The host* (``host.py``).  An active rxe device on this machine is used as it is.  Root on a kernel with
   the module makes one on a ``dummy`` interface and removes it afterwards.
2. *A virtual machine* otherwise.  What it needs comes from the machine's own apt (``packages.py``): QEMU and
   the RDMA user-space tools are installed; a stock distribution kernel and a static busybox are only
   downloaded and unpacked into the cache (``kernel.py``), which also unpacks the compressed kernel, for
   emulated machines take seconds over it, and packs the few modules needed into an initramfs.
3. The *guest* (``guest.py``, ``guest-init.sh``) shares this machine's root file system through virtiofs, or
   9p where virtiofsd cannot be used, below an overlay whose writes stay in the guest's memory.  Only the
   repository and the working directory are mounted writable.  So every program, venv and library of this
   machine is there under its own path.
4. In the guest, ``agent.py`` runs as process 1 and executes the command.  It talks frames (standard input,
   output, error, signals, exit status) over one virtio-serial port whose other end is a socket pair here
   (``supervisor.py``): nothing listens on a network, output is never mixed with the kernel's console, and the
   machine is killed the moment the exit status is in.

KVM is used when a guest really runs on it (``accel.py``: a present /dev/kvm proves nothing), else TCG.

Exit status: the command's own (128+n for signal n), 124 past the deadline, 125 when this tool or the guest
failed, 126/127 when the command cannot be executed/found.

The guest sees files of this machine as they are when first looked at (virtiofs ``cache=always``): do not edit
the tree under a running guest and expect it to notice.  A guest process that may not write byte code compiles
every module anew, which is dear under emulation: leave PYTHONDONTWRITEBYTECODE unset for speed.
"""

"""Runs a model-written program against tests that it never sees, where it can do no harm.

1. passes() starts a child, `python -I`, in a session, an empty temporary folder and an empty environment. It
   (the judge) first reads the program alone and forks the process that is to run it.
2. That process is isolated: process, mount, network and IPC namespaces; a root folder with Python and the
   system's libraries, read-only, and 32 MB of scratch space; no capabilities; limits on time, memory, files
   and processes; no input or output; a seccomp filter against sockets and memory that outlives it. Where
   there are no namespaces, Landlock closes the files, and the filter all ways to reach or make a process.
3. The judge then reads the tests and a secret, and runs the tests itself. To it, the program's functions are
   Remotes: a call goes through a pipe to the program's process, data comes back, the judge compares. The
   tests' own functions (`key=lambda ...`) stay with the judge, which calls them as the program asks. The
   program can reach neither expected values nor the secret, the asserts or the comparisons.
4. When every test has passed, the judge writes the secret, the only thing that counts, and kills the program.

What this does not protect from
- Errors of the kernel. Programs written to attack you belong in a virtual machine.
- Programs made for the tests that their prompt shows. Keep tests back if that matters.
- The tests: they run outside of the sandbox, with the caller's rights. Take them from a trusted source.
- Load: a program may use up its allowance (seconds, memory, 16 processes), and slow down others meanwhile.
- Reading the system's and Python's own files (/usr, /lib, the virtual environment).
- Where there are no namespaces: times and attributes of the user's files; before Linux 5.13 (Landlock), the
  files too. Where there is no filter either (x86-64, aarch64), no program is run. Linux only.
"""
import _pickle  # pickle itself takes 6 ms to import
import ast
import builtins
import ctypes
import os
import resource
import signal
import struct
import sys
import types
from _collections_abc import MappingView
from contextlib import suppress
from functools import partial

CPU_SECONDS, WALL_SECONDS, PROCESSES = 4, 10, 16
MEMORY, FILE_SIZE, REPLY = 512 << 20, 16 << 20, 1 << 20  # bytes; REPLY: what one call may return
REMOTE = "\0remote"  # begins the tuple that stands for what has no literal of its own
LITERALS = bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None)
# what else is data: name -> module, what it is written as
DATA = {"float": ("builtins", str), "frozenset": ("builtins", tuple), "Fraction": ("fractions", str),
        "Decimal": ("decimal", str), "deque": ("collections", list), "Counter": ("collections", dict),
        "OrderedDict": ("collections", dict), "KeysView": ("_collections_abc", dict.fromkeys),
        "ItemsView": ("_collections_abc", dict)}
# The judge imports this file, so that it is not compiled each time, and some modules only where needed.
JUDGE = ("import gc, sys; gc.disable(); sys.path.insert(0, sys.argv.pop()); import sandbox; gc.enable(); "
         "del sys.path[0]; sandbox.judge()")  # collecting while it imports would take 2 ms

def passes(program, tests, setup="", namespaces=True, seconds=(CPU_SECONDS, WALL_SECONDS)):
    """Whether a program passes every test (statements, as `setup`) within (processor, clock) seconds."""
    import subprocess
    import tempfile

    if len(program) > 100_000 or not "".join(tests).strip():
        return False
    secret = os.urandom(16).hex()
    folder = tempfile.mkdtemp(prefix="program-")
    inner = os.path.join(folder, "inner")  # so that `../file` lies in a folder that is removed as well
    os.mkdir(inner)
    with open(os.path.join(folder, "program"), "w") as file:
        file.write(ascii((program, namespaces, seconds)))
    command = [sys.executable, "-I", "-X", "int_max_str_digits=100000", "-c", JUDGE,
               os.path.dirname(os.path.abspath(__file__))]
    judge = subprocess.Popen(command, cwd=inner, env={"OMP_NUM_THREADS": "1"}, start_new_session=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        request = f"{ascii((setup, tests, secret))}\n".encode()
        return judge.communicate(request, seconds[1] + 4)[0] == secret.encode()
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        with judge, suppress(ProcessLookupError):  # as a rule, none of its group is left
            os.killpg(judge.pid, signal.SIGKILL)
        with suppress(OSError):
            os.rmdir(inner)
            os.rmdir(folder)
        if os.path.exists(folder):  # unlike shutil.rmtree, rm removes thousands of nested folders
            remove = ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder]
            subprocess.run(remove, stderr=subprocess.DEVNULL)

def send(stream, value):
    stream.write(ascii(value).encode() + b"\n")
    stream.flush()

def receive(stream, limit=-1):
    line = stream.readline(limit)
    if not line.endswith(b"\n"):
        raise EOFError
    return ast.literal_eval(line.decode())


# ------------------------------------------------------------------------- the judge
def judge():
    """Runs the program, then the tests that come on stdin; writes the secret that follows if all pass."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("../program") as file:
        program, namespaces, (cpu_seconds, wall_seconds) = ast.literal_eval(file.read())
    os.remove(file.name)
    signal.alarm(wall_seconds)  # ends the judge, and with it the program
    folder, requests, replies = os.getcwd(), os.pipe(), os.pipe()
    apart = namespaces and enter_namespaces(libc)
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: no other process reads the judge's memory
    first = os.fork()  # before the tests are read; the first process of a namespace takes all others with it
    if first == 0:
        try:
            isolate(libc, folder, apart, cpu_seconds)
            if not apart or (pid := os.fork()) == 0:
                serve(program, requests[0], replies[1])
            os.closerange(0, 1024)
            while os.wait()[0] != pid:
                pass
        finally:
            os._exit(0)
    try:
        os.close(requests[0])
        os.close(replies[1])
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))
        setup, tests, secret = receive(sys.stdin.buffer)
        sys.stdout = None  # for a test that prints
        streams = open(requests[1], "wb"), open(replies[0], "rb")
        names = Names(setup, tests, partial(ask, *streams))
        for test in [setup, *tests]:
            exec(compile(test, "test", "exec"), names)
        os.write(1, secret.encode())
    except BaseException:  # a failed assert, an error or the end of the program, memory used up
        pass
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        os._exit(0)

class Names(dict):
    """The names that tests can use: their own, builtins, standard modules; any other is the program's.

    It never replaces a builtin or module that a test uses (`set`, `math.isclose`). Only where the tests use
    no names but builtins, they test the program's functions of those names (`def sum`)."""

    def __init__(self, setup, tests, ask):
        nodes = [node for test in [setup, *tests] for node in ast.walk(ast.parse(test))]
        owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        functions = [node.func for node in nodes if isinstance(node, ast.Call)]
        used, self.modules, called = (
            {node.id for node in group if isinstance(node, ast.Name)} for group in (nodes, owners, functions))
        self.own = set() if used - set(dir(builtins)) else called
        self.ask = ask
        super().__init__(__builtins__=builtins)

    def __missing__(self, name):
        if hasattr(builtins, name) and name not in self.own:
            raise KeyError(name)  # Python then looks among the builtins
        if name in self.modules and name in sys.stdlib_module_names:
            return __import__(name)
        value = self.ask(f"(lambda: {name})", ())  # a NameError where the program has none
        # a test may change it in place
        return Remote(f"(lambda: {name})()", self.ask) if isinstance(value, (list, dict, set)) else value

class Remote:
    """Something of the program's: where it is used in a test, the program's process is asked."""

    def __init__(self, source, ask):
        self.__dict__.update(_source=source, _ask=ask)

    def __eq__(self, other):
        value = self._ask("(lambda it: it)", (self,))
        if not isinstance(value, Remote):  # a list among the program's variables
            return value == other
        # a range, a date: by its repr, not by the program's __eq__; but what is no data is equal to none
        return self is other or not isinstance(other, (Remote, *LITERALS)) and repr(self) == repr(other)

    def __iter__(self):
        return iter(self._ask("list", (self,)))

    __hash__ = object.__hash__

for name in ("getattr", "setattr", "getitem", "next", "len", "bool", "repr", "str"):
    setattr(Remote, f"__{name}__", lambda self, *args, name=name: self._ask(name, (self, *args)))

class RemoteCallable(Remote):
    def __call__(self, *args, **kwargs):
        return self._ask(self, args, kwargs)

class Pickler(_pickle.Pickler):  # of what goes to the program's process
    handed = []  # functions of the tests, which go by their number

    def persistent_id(self, value):
        if isinstance(value, Remote):
            return value._source
        if isinstance(value, types.FunctionType) and type(value.__globals__) is Names:
            self.handed.append(value)
            return len(self.handed) - 1

    def reducer_override(self, value):
        make = iter if isinstance(value, types.GeneratorType) else isinstance(value, MappingView) and list
        return (make, (list(value),)) if make else NotImplemented

def ask(requests, replies, function, args, kwargs=None):
    """Has the program's process call a function. Lists, dicts and sets in args change as they do there."""
    def received(value):
        if isinstance(value, tuple) and value[:1] == (REMOTE,):
            _, kind, content = value
            if kind in DATA:
                return getattr(__import__(DATA[kind][0]), kind)(received(content))
            remote = RemoteCallable if kind == "callable" else Remote
            return remote(f"remote[{content:d}]", partial(ask, requests, replies))
        if isinstance(value, dict):
            return {received(key): received(item) for key, item in value.items()}
        return type(value)(map(received, value)) if isinstance(value, (list, tuple, set)) else value

    message = function, args, kwargs or {}
    while True:
        Pickler(requests).dump(message)
        requests.flush()
        error, value, after = received(receive(replies, REPLY))
        if error is not None:
            break
        try:  # the program calls a function of the tests
            message = "return", Pickler.handed[value](*after[0], **after[1])
        except Exception as problem:
            message = "raise", problem
    if error:
        kind = getattr(builtins, error, Exception)
        raise kind(value) if isinstance(kind, type) and issubclass(kind, Exception) else Exception(value)
    for old, new in zip(args, after):
        if isinstance(old, type(new)) and hasattr(type(old), "clear") and old != new:
            old.clear()
            (old.extend if hasattr(old, "extend") else old.update)(new)
    return value


# ------------------------------------------------------------------------- the program's process
def serve(program, requests, replies):
    """Runs the program, then answers calls as long as the judge asks. To the judge, its answers are data."""
    os.dup2(requests, 3)
    os.dup2(replies, 4)
    for standard in (0, 1, 2):
        os.dup2(os.open("/dev/null", os.O_RDWR), standard)
    os.closerange(5, 1024)
    requests, replies, references = open(3, "rb"), open(4, "wb"), []
    known = {**vars(builtins), "remote": references, "getitem": lambda it, key: it[key]}  # not the program's
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(program, "program.py", "exec"), module.__dict__)

    def plain(value):
        """Data as literals, or by the names of its types; anything else stays here and goes by its number."""
        for base in LITERALS[:9]:
            if isinstance(value, base) and (base is not float or abs(value) < float("inf")):
                return base(map(plain, value) if base in (list, tuple, set) else value)
        for name, (source, written) in DATA.items():
            if isinstance(value, getattr(sys.modules.get(source), name, ())):
                return REMOTE, name, plain(written(value))
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if value is None:
            return value
        if isinstance(value, getattr(sys.modules.get("numpy"), "generic", ())):
            return plain(value.item())
        references.append(value)
        return REMOTE, "callable" if callable(value) else "object", len(references) - 1

    def call(number, *args, **kwargs):
        send(replies, (None, number, (plain(args), plain(kwargs))))
        return answer_calls()

    def answer_calls():
        """Answers the judge's calls, or ends as the tests' function that was called did."""
        while True:
            unpickler = _pickle.Unpickler(requests)
            unpickler.persistent_load = lambda it: (  # something of the program's, or a function of the tests
                eval(it, module.__dict__, known) if isinstance(it, str) else partial(call, it))
            function, *given = unpickler.load()
            if function == "return":
                return given[0]
            if function == "raise":
                raise given[0]
            try:
                args, kwargs = given
                function = eval(function, module.__dict__, known) if isinstance(function, str) else function
                reply = ("", plain(function(*args, **kwargs)), plain(args))
            except Exception as error:
                reply = (type(error).__name__, str(error)[:1000], ())
            send(replies, reply)

    answer_calls()


# ------------------------------------------------------------------------- what isolates it
def enter_namespaces(libc):
    """Process, mount, network and IPC namespaces for the next children; False where there are none."""
    uid, gid = os.getuid(), os.getgid()
    apart = 0x20000000 | 0x00020000 | 0x40000000 | 0x08000000  # CLONE_NEWPID, NEWNS, NEWNET, NEWIPC
    if libc.unshare(apart) == 0:
        return True
    if libc.unshare(apart | 0x10000000) != 0:  # NEWUSER, in which any user may create the others
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with suppress(OSError), open(f"/proc/self/{file}", "w") as settings:
            settings.write(text)  # AppArmor may forbid this: namespaces without the right to mount
    return True

def isolate(libc, folder, apart, cpu_seconds):
    """Leaves to this process and its children only Python, scratch space and the processor."""
    rooted = False
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    with suppress(OSError):
        rooted = apart and not new_root(libc, folder)
    if not rooted:
        landlock(libc, folder)
    if os.getuid() == 0 and (rooted or world_readable(os.__file__)):  # root has no limit on processes
        nobody = 1_000_000_000 + int.from_bytes(os.urandom(3), "big")
        with suppress(OSError):  # fails in a user namespace in which root is the only user
            if not rooted:
                os.chown(".", nobody, nobody)
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capabilities
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the judge
    for name, value in [("CPU", cpu_seconds), ("AS", MEMORY), ("FSIZE", FILE_SIZE), ("NOFILE", 64),
                        ("CORE", 0), *[("NPROC", PROCESSES)] * apart]:  # else the user's others would count
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if not deny_calls(libc, apart) and not apart:
        os._exit(1)

def new_root(libc, folder):
    """A root folder of Python and the system's libraries, read-only, and of scratch space."""
    def mount(source, path, kind, flags, options=None):
        source, path, kind, options = (text and text.encode() for text in (source, path, kind, options))
        if libc.mount(source, path, kind, ctypes.c_ulong(flags), options) != 0:
            raise OSError("the kernel does not allow it")

    mount(None, "/", None, 0x44000)  # MS_REC, MS_PRIVATE: nothing of this is seen outside
    mount("tmpfs", folder, "tmpfs", 0, "size=1m,mode=755")
    for path in sorted({"/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix}, key=len):
        if os.path.islink(path):
            os.symlink(os.readlink(path), folder + path)
        elif os.path.isdir(path) and not os.path.exists(folder + path):
            os.makedirs(folder + path)
            mount(path, folder + path, None, 0x5000)  # MS_BIND, MS_REC
    os.mkdir(folder + "/dev")
    os.mkdir(folder + "/scratch")
    for device in ("/dev/null", "/dev/urandom"):
        os.close(os.open(folder + device, os.O_CREAT))
        mount(device, folder + device, None, 0x1000)
    # mount_setattr, recursively: MOUNT_ATTR_RDONLY, NOSUID
    if libc.syscall(442, -100, folder.encode(), 0x8000, (ctypes.c_uint64 * 4)(1 | 2), 32) != 0:
        raise OSError("this kernel is older than 5.12")
    mount("tmpfs", folder + "/scratch", "tmpfs", 2 | 4, "size=32m,nr_inodes=4096,mode=1777")
    os.chroot(folder)
    os.chdir("/scratch")

def landlock(libc, folder):
    """Closes all files but Python's and the system's, to read, and this folder; as far as the kernel can."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset; 445: add_rule, 446: restrict_self
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # rights that this version knows
    rules = libc.syscall(444, (ctypes.c_uint64 * 1)(files), 8, 0)
    readable = dict.fromkeys(("/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix), 13)  # run, read, list
    for path, rights in {**readable, folder: files, "/dev/null": 2 | 4, "/dev/urandom": 4}.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            libc.syscall(445, rules, 1, rights.to_bytes(8, "little") + fd.to_bytes(4, "little"), 0)
    libc.syscall(446, rules, 0)

def deny_calls(libc, apart):
    """A seccomp filter: the calls below fail with EPERM. False where there is no such filter."""
    # shmget, semget, msgget, mq_open, memfd_create, add_key, keyctl, socket, io_uring_setup, unshare
    always = {"x86_64": (29, 64, 68, 240, 319, 248, 250, 41, 425, 272),
              "aarch64": (194, 190, 186, 180, 279, 217, 219, 198, 425, 97)}
    # fcntl, ioctl, clone, clone3; setsid, setpgid, ptrace, prlimit64, kill, tkill, tgkill, rt_sigqueueinfo,
    # rt_tgsigqueueinfo, pidfd_send_signal, pidfd_getfd, process_vm_readv, process_vm_writev, setpriority,
    # ioprio_set, sched_setaffinity, sched_setscheduler, sched_setparam, sched_setattr, fchmod, fchmodat,
    # fchmodat2, fallocate (2 GB at once, whatever the limit); on x86-64 also fork, vfork, chmod
    alone = {"x86_64": (72, 16, 56, 435, 112, 109, 101, 302, 62, 200, 234, 129, 297, 424, 438, 310, 311, 141,
                        251, 203, 144, 142, 314, 91, 268, 452, 285, 57, 58, 90),
             "aarch64": (25, 29, 220, 435, 157, 154, 117, 261, 129, 130, 131, 138, 240, 424, 438, 270, 271,
                         140, 30, 122, 119, 118, 274, 52, 53, 452, 47)}
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(machine := os.uname().machine)
    if not audit:
        return False
    deny, allow = (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), deny]  # another architecture: 32 bits
    code += [(0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), deny]  # x32, by the call's number
    rules = dict.fromkeys(always[machine] + (() if apart else alone[machine]), [deny])
    if not apart:
        fcntl, ioctl, clone, clone3 = alone[machine][:4]
        owner = 8, 10, 15, 0x8901, 0x8902  # F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP
        jumps = [(0x15, len(owner) - i, 0, value) for i, value in enumerate(owner)]
        rules[fcntl] = rules[ioctl] = [(0x20, 0, 0, 24), *jumps, allow, deny]  # by the second argument
        rules[clone] = [(0x20, 0, 0, 16), (0x45, 1, 0, 0x10000), deny, allow]  # CLONE_THREAD is allowed
        rules[clone3] = [(6, 0, 0, 0x00050026)]  # ENOSYS: the C library then takes clone
    for number, steps in rules.items():
        code += [(0x15, 0, len(steps), number), *steps]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*code, allow]))
    steps = struct.pack("HP", len(code) + 1, ctypes.addressof(packed))
    return libc.prctl(22, 2, steps, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

def world_readable(path):
    needed = 1 if os.path.isdir(path) else 4  # to pass through a folder, to read a file
    return path == "/" or os.stat(path).st_mode & needed != 0 and world_readable(os.path.dirname(path))

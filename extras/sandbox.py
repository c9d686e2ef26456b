"""Runs a model-written program against tests that it never sees, where it can do no harm.

1. passes() starts a child, `python -I`, in a session, an empty temporary folder and an empty environment. It
   (the judge) first reads the program alone and forks the process that is to run it.
2. That process is isolated: process, mount, network and IPC namespaces; a root folder with Python and the
   system's libraries, read-only, and 32 MB of scratch space; no capabilities; limits on CPU and wall time,
   memory, files and processes; no input or output; a seccomp filter against sockets and against memory that
   outlives a process (System V and POSIX IPC). Where there are no namespaces, Landlock closes the files
   instead, and the filter also forbids new processes, threads, sessions and signals.
3. The judge then reads the tests and a secret, and runs the tests itself. To it, the program's functions are
   Remotes: a call goes through a pipe to the program's process, plain data comes back, the judge compares.
   The program can reach neither expected values nor the secret, the asserts or the comparisons.
4. When every test has passed, the judge writes the secret, the only thing that counts, and kills the program.

What this does not protect from
- Errors of the kernel. Programs written to attack you belong in a virtual machine.
- Programs made for the tests that their prompt shows. Keep tests back if that matters.
- The tests: they run outside of the sandbox, with the caller's rights. Take them from a trusted source.
- Load: a program may use up its allowance (seconds, memory, 16 processes), and slow down others meanwhile.
- Reading the system's and Python's own files (/usr, /lib, the virtual environment).
- Where there are no namespaces: times and attributes of the user's files, priorities of its processes. Where
  there is no Landlock either (Linux 5.13), files are as open to the program as to its user. Where there is no
  filter either (x86-64, aarch64), no program is run. Linux only.
"""
import ast
import builtins
import ctypes
import math
import os
import signal
import struct
import sys
import types
from contextlib import suppress
from functools import partial

CPU_SECONDS, WALL_SECONDS, PROCESSES = 4, 10, 16
MEMORY, FILE_SIZE, REPLY = 512 << 20, 16 << 20, 1 << 20  # bytes; REPLY: what one call may return
REMOTE = "\0remote"  # begins the tuple that stands for what has no literal of its own
# The judge imports this file, so that it is not compiled each time, and some modules only where needed.
JUDGE = "import sys; sys.path.insert(0, sys.argv.pop()); import sandbox; del sys.path[0]; sandbox.judge()"

def passes(program, tests, setup="", namespaces=True, seconds=(CPU_SECONDS, WALL_SECONDS)):
    """True where a program passes every test, within (processor, clock) seconds.

    tests: Python statements, most of them asserts. setup: statements to come before them.
    """
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
    command = [sys.executable, "-I", "-X", "int_max_str_digits=100000", "-c", JUDGE]
    judge = subprocess.Popen([*command, os.path.dirname(os.path.abspath(__file__))], cwd=inner, env={},
                             start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    try:
        request = f"{ascii((setup, tests, secret))}\n".encode()
        return judge.communicate(request, seconds[1] + 4)[0] == secret.encode()
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        with suppress(ProcessLookupError):  # as a rule, none of its group is left
            os.killpg(judge.pid, signal.SIGKILL)
        judge.wait()
        judge.stdin.close()
        judge.stdout.close()
        try:
            os.rmdir(inner)
            os.rmdir(folder)
        except OSError:  # files of the program; unlike shutil.rmtree, rm removes thousands of nested folders
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
    import resource

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
            pid = os.fork() if apart else 0
            if pid == 0:
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
        result = os.dup(1)
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)  # for a test that prints
        streams = open(requests[1], "wb"), open(replies[0], "rb")
        names = Names(setup, tests, partial(ask, streams))
        for test in [setup, *tests]:
            exec(compile(test, "test", "exec"), names)
        os.write(result, secret.encode())
    except BaseException:  # a failed assert, an error or the end of the program, memory used up
        pass
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        os._exit(0)

class Names(dict):
    """The names that tests can use: their own, builtins, standard modules; any other is the program's.

    What the program defines never replaces a builtin or module that a test uses (`set`, `math.isclose`). Only
    where the tests use no names but builtins, they test the program's functions of those names (`def sum`).
    """

    def __init__(self, setup, tests, ask):
        nodes = [node for test in [setup, *tests] for node in ast.walk(ast.parse(test))]
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        functions = [node.func for node in nodes if isinstance(node, ast.Call)]
        self.modules = {node.id for node in owners if isinstance(node, ast.Name)}
        called = {node.id for node in functions if isinstance(node, ast.Name)}
        self.own = set() if used - set(dir(builtins)) else called
        self.ask = ask
        super().__init__(__builtins__=builtins)

    def __missing__(self, name):
        if hasattr(builtins, name) and name not in self.own:
            raise KeyError(name)  # Python then looks among the builtins
        if name in self.modules and name in sys.stdlib_module_names:
            return __import__(name)
        value = self.ask(f"(lambda: {name})", ())  # a NameError where the program has none
        if isinstance(value, (list, dict, set)):  # a test may change it in place
            return Remote(f"(lambda: {name})()", self.ask)
        return value

def asks(function):
    """A method that has the program's process call a function on the object and the method's arguments."""
    return lambda self, *args: self._ask(function, (self, *args))

class Remote:
    """Something of the program's: where it is used in a test, the program's process is asked."""

    def __init__(self, source, ask):
        self.__dict__.update(_source=source, _ask=ask)

    def __eq__(self, other):  # a Fraction, a date: by its repr, not by the program's __eq__
        return self is other or not isinstance(other, Remote) and repr(self) == repr(other)

    def __iter__(self):
        return iter(self._ask("list", (self,)))

    __hash__ = object.__hash__
    __getattr__ = asks("getattr")
    __setattr__ = asks("setattr")
    __getitem__ = asks("(lambda it, key: it[key])")
    __next__ = asks("next")
    __len__ = asks("len")
    __bool__ = asks("bool")
    __repr__ = asks("repr")
    __str__ = asks("str")

class RemoteCallable(Remote):
    def __call__(self, *args, **kwargs):
        return self._ask(self, args, kwargs)

def ask(streams, function, args, kwargs=None):
    """Has the program's process call a function. Lists, dicts and sets in args change as they do there."""
    requests, replies = streams

    def source(value):
        if isinstance(value, Remote):
            return value._source
        if type(value) is dict:
            return "{" + ", ".join(f"{source(key)}: {source(item)}" for key, item in value.items()) + "}"
        if type(value) in (list, tuple, set, frozenset):
            return f"{type(value).__name__}([{', '.join(map(source, value))}])"
        return f"float('{value}')" if isinstance(value, float) else repr(value)

    def received(value):
        if isinstance(value, tuple) and value[:1] == (REMOTE,):
            _, kind, content = value
            if kind == "float":
                return float(content)
            if kind == "frozenset":
                return frozenset(map(received, content))
            remote = RemoteCallable if kind == "callable" else Remote
            return remote(f"remote[{content:d}]", partial(ask, streams))
        if isinstance(value, dict):
            return {received(key): received(item) for key, item in value.items()}
        return type(value)(map(received, value)) if isinstance(value, (list, tuple, set)) else value

    function = function if isinstance(function, str) else source(function)
    send(requests, f"({function}, {source(args)}, {source(kwargs or {})})")
    error, value, after = received(receive(replies, REPLY))
    if error:
        kind = getattr(builtins, error, Exception)
        raise kind(value) if isinstance(kind, type) and issubclass(kind, Exception) else Exception(value)
    for old, new in zip(args, after):
        if type(old) is type(new) and type(old) in (list, dict, set) and old != new:
            old.clear()
            fill = old.extend if type(old) is list else old.update
            fill(new)
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
    known = {**vars(builtins), "remote": references}  # so that `list` in a request is never the program's
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(program, "program.py", "exec"), module.__dict__)

    def plain(value):
        """Data as literals of its base type; anything else stays here and goes by its number."""
        if isinstance(value, float) and not math.isfinite(value):
            return REMOTE, "float", repr(float(value))
        for base in (bool, int, float, complex, str, bytes):
            if isinstance(value, base):
                return base(value)
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(map(plain, value))
        if isinstance(value, set):
            return set(map(plain, value))
        if isinstance(value, frozenset):
            return REMOTE, "frozenset", tuple(map(plain, value))
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if value is None:
            return value
        if hasattr(type(value), "__index__"):  # numpy's integers
            return int(value)
        references.append(value)
        return REMOTE, "callable" if callable(value) else "object", len(references) - 1

    while True:
        request = receive(requests)
        try:
            function, args, kwargs = eval(request, module.__dict__, known)
            reply = ("", plain(function(*args, **kwargs)), plain(args))
        except Exception as error:
            reply = (type(error).__name__, str(error)[:1000], ())
        send(replies, reply)


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
        with suppress(OSError):  # AppArmor may forbid this: namespaces without the right to mount
            with open(f"/proc/self/{file}", "w") as settings:
                settings.write(text)
    return True

def isolate(libc, folder, apart, cpu_seconds):
    """Leaves to this process and its children only Python, scratch space and the processor."""
    import resource

    try:
        rooted = apart and not new_root(libc, folder)
    except OSError:
        rooted = False
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
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capabilities
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the judge
    for name, value in [("CPU", cpu_seconds), ("AS", MEMORY), ("FSIZE", FILE_SIZE), ("NPROC", PROCESSES),
                        ("NOFILE", 64), ("CORE", 0)]:
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
    if version < 1:
        return
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # rights that this version knows
    rules = libc.syscall(444, (ctypes.c_uint64 * 1)(files), 8, 0)
    readable = dict.fromkeys(("/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix), 13)  # run, read, list
    for path, rights in {**readable, folder: files, "/dev/null": 2 | 4, "/dev/urandom": 4}.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            libc.syscall(445, rules, 1, rights.to_bytes(8, "little") + fd.to_bytes(4, "little"), 0)
    libc.prctl(38, 1, 0, 0, 0)
    libc.syscall(446, rules, 0)

def deny_calls(libc, apart):
    """A seccomp filter: the calls below fail with EPERM. False where there is no such filter."""
    # shmget, semget, msgget, mq_open, memfd_create, add_key, keyctl, socket, io_uring_setup, unshare
    always = {"x86_64": (29, 64, 68, 240, 319, 248, 250, 41, 425, 272),
              "aarch64": (194, 190, 186, 180, 279, 217, 219, 198, 425, 97)}
    # clone, clone3, setsid, setpgid, ptrace, prlimit64, kill, tkill, tgkill, rt_sigqueueinfo,
    # rt_tgsigqueueinfo, pidfd_send_signal, fchmod, fchmodat, fchmodat2; on x86-64 also fork, vfork, chmod
    alone = {"x86_64": (56, 435, 112, 109, 101, 302, 62, 200, 234, 129, 297, 424, 91, 268, 452, 57, 58, 90),
             "aarch64": (220, 435, 157, 154, 117, 261, 129, 130, 131, 138, 240, 424, 52, 53, 452)}
    machine = os.uname().machine
    if machine not in always:
        return False
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    deny, allow = (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), deny]  # another architecture: 32 bits
    code += [(0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), deny]  # x32, by the call's number
    for number in always[machine] + (() if apart else alone[machine]):
        code += [(0x15, 0, 1, number), deny]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*code, allow]))
    steps = struct.pack("HP", len(code) + 1, ctypes.addressof(packed))
    return libc.prctl(22, 2, steps, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

def world_readable(path):
    needed = 1 if os.path.isdir(path) else 4  # to pass through a folder, to read a file
    return path == "/" or os.stat(path).st_mode & needed != 0 and world_readable(os.path.dirname(path))

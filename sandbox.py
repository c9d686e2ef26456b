"""Runs a model-written program against tests that it never sees, where it can do no harm.

1. passes() starts a child, `python -I`, in a session, an empty temporary folder and an empty environment of its own. The
   child gets the program, then the tests and a secret.
2. The child (the judge) reads the program alone, forks the process that is to run it, and shuts that one in (shut_in):
   process, mount, network and IPC namespaces; a root folder that holds Python and the system's libraries, read-only, with
   32 MB of scratch space that vanish with it; no capabilities; limits on CPU and wall time, memory, files, file size and
   processes; no input, output to nowhere. Where the kernel allows no namespaces: Landlock in their place, and one process
   without threads.
3. The judge reads the tests and runs them itself. What the program defines is known to it only as a Remote: a call goes
   through a pipe to the program's process, plain data (numbers, text, lists ...) comes back, and the judge compares.
   Expected values, secret, asserts and comparisons are never within the program's reach: leaving, printing, patching,
   frames, an object equal to everything do not help.
4. When every test has passed, the judge writes the secret, the only thing that counts, and kills whatever the program
   started: a process namespace ends with its first process; without one, orphans fall to the judge.

What this does not protect from
- Errors of the kernel, on which the program runs. For programs that someone writes to attack you, take a virtual machine.
- Programs made for the tests that their prompt shows: calls and results from there can be copied. Keep tests back if
  that matters.
- The tests: they run outside of the walls, with the caller's rights. Take them from a source that you trust.
- Load: a program may use up its allowance (seconds, memory, 16 processes), and slow down others meanwhile.
- Reading the system's and Python's own files (/usr, /lib, the virtual environment).
- Where the kernel allows no namespaces (containers, often): other files are shut by Landlock (Linux 5.13) alone, TCP from
  Linux 6.7, signals to the caller's processes from Linux 6.12; other sockets are not. Without both only the limits hold.
- Linux only.
"""
import ast
import builtins
import math
import os
import signal
import sys

CPU_SECONDS, WALL_SECONDS, PROCESSES = 4, 10, 16
MEMORY, FILE_SIZE, REPLY = 512 << 20, 16 << 20, 1 << 20  # bytes; REPLY: what one call may return
REMOTE = "\0remote"  # before the number of an object that stays in the program's process
# As a module, so that this file is not compiled each time. Modules that only one side needs are imported there: for a
# judge of a tenth of a second each of them counts.
JUDGE = "import sys; sys.path.append(sys.argv.pop()); import sandbox; sandbox.judge()"


def passes(program, tests, setup="", namespaces=True, seconds=(CPU_SECONDS, WALL_SECONDS)):
    """True where a program passes every test, within (processor, clock) seconds.

    tests: Python statements, most of them asserts. setup: statements to come before them.
    """
    import shutil
    import subprocess
    import tempfile

    if len(program) > 100_000 or not tests:
        return False
    secret, folder = os.urandom(16).hex(), tempfile.mkdtemp(prefix="program-")
    os.mkdir(inner := os.path.join(folder, "inner"))  # `../file` still lies in a folder that goes
    request = framed((program, inner, namespaces, seconds)) + framed((setup, tests, secret))
    command = [sys.executable, "-I", "-c", JUDGE, os.path.dirname(os.path.abspath(__file__))]
    judge = subprocess.Popen(command, cwd=inner, env={}, start_new_session=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        return judge.communicate(request, seconds[1] + 4)[0] == secret.encode()
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        if judge.poll() is None:
            os.killpg(judge.pid, signal.SIGKILL)
        judge.wait()
        judge.stdin.close(), judge.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- messages: literals with their length
def framed(value):
    data = ascii(value).encode()
    return len(data).to_bytes(4, "big") + data


def send(fd, value):
    data = framed(value)
    while data:
        data = data[os.write(fd, data):]


def receive(fd, limit=1 << 30):
    def exactly(size):
        data = bytearray()
        while len(data) < size:
            if not (piece := os.read(fd, min(size - len(data), 1 << 16))):
                raise EOFError
            data += piece
        return data
    size = int.from_bytes(exactly(4), "big")
    if size > limit:
        raise ValueError("too long")
    return ast.literal_eval(exactly(size).decode())


# ---------------------------------------------------------------------------------------------- the judge
def judge():
    """Runs the program that its input begins with, apart from the tests that come next; all passed, it writes their secret."""
    import ctypes
    import resource

    libc = ctypes.CDLL(None, use_errno=True)
    # No more is read yet: what is forked must not hold the tests.
    program, folder, namespaces, (cpu_seconds, wall_seconds) = receive(0)
    requests, replies = os.pipe(), os.pipe()
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of the program become the judge's children
    apart = namespaces and enter_namespaces(libc)
    first = os.fork()  # the first process of the namespace: when it ends, the kernel ends all others there
    if first == 0:
        try:
            shut_in(libc, folder, apart)
            if (pid := os.fork()) == 0:
                libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the process that started it
                os.dup2(requests[0], 3), os.dup2(replies[1], 4)
                for standard in (0, 1, 2):
                    os.dup2(os.open("/dev/null", os.O_RDWR), standard)
                os.closerange(5, 1024)
                for limit, value in {"CPU": cpu_seconds, "AS": MEMORY, "CORE": 0, "FSIZE": FILE_SIZE, "NOFILE": 64,
                                     "NPROC": PROCESSES if apart else 0}.items():
                    resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
                serve(program)
            os.closerange(0, 1024)
            while os.wait()[0] != pid:
                pass
        finally:
            os._exit(0)

    def too_late(*_):
        raise TimeoutError
    try:
        os.close(requests[0]), os.close(replies[1])
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: no other process reads the judge's memory
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(wall_seconds)
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))
        setup, tests, secret = receive(0)
        result = os.dup(1)
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)  # for a test that prints
        names = Names(setup, tests, lambda *call: ask(requests[1], replies[0], *call))
        for test in [setup, *tests]:
            exec(compile(test, "test", "exec"), names)
        os.write(result, secret.encode())
    except BaseException:  # a failed assert, an error or the end of the program, time or memory used up: not passed
        pass
    finally:
        signal.alarm(0)
        end_all(first)
    os._exit(0)


def end_all(child):
    """Kills a child, and then the orphans that fall to this process, until none is left."""
    try:
        while True:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with open("/proc/thread-self/children") as children:
                child = int(children.read().split()[0])
    except (OSError, IndexError):
        pass


class Names(dict):
    """The names that tests can use: their own, builtins, the standard library's modules; any other is the program's.

    What the program defines never replaces a builtin or module that a test uses (`set`, `math.isclose`). Only where the
    tests use no names but builtins, they test the program's functions of those names (`def sum`).
    """
    def __init__(self, setup, tests, ask):
        nodes = [node for test in [setup, *tests] for node in ast.walk(ast.parse(test))]
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        functions = [node.func for node in nodes if isinstance(node, ast.Call)]
        self.modules, called = ({node.id for node in some if isinstance(node, ast.Name)} for some in (owners, functions))
        self.own = set() if used - set(dir(builtins)) else called
        self.ask = ask
        super().__init__(__builtins__=builtins)

    def __missing__(self, name):
        if hasattr(builtins, name) and name not in self.own:
            raise KeyError(name)  # Python goes on to look among the builtins
        if name in self.modules and name in sys.stdlib_module_names:
            return __import__(name)
        return Remote(name, self.ask)


class Remote:
    """Something of the program's: where it is used in a test, the program's process is asked."""
    def __init__(self, source, ask):
        self.__dict__.update(_source=source, _ask=ask)

    def __call__(self, *args, **kwargs):
        return self._ask(self, args, kwargs)

    def __eq__(self, other):  # a Fraction, a date: must show as what is expected; the program's own __eq__ has no say
        return self is other or not isinstance(other, Remote) and repr(self) == repr(other)

    __hash__ = object.__hash__

    def __getattr__(self, name):
        return self._ask("getattr", (self, name))

    def __setattr__(self, name, value):
        self._ask("setattr", (self, name, value))

    def __getitem__(self, key):
        return self._ask("(lambda it, key: it[key])", (self, key))

    def __iter__(self):
        return iter(self._ask("list", (self,)))

    def __next__(self):
        return self._ask("next", (self,))

    def __len__(self):
        return self._ask("len", (self,))

    def __bool__(self):
        return self._ask("bool", (self,))

    def __repr__(self):
        return str(self._ask("repr", (self,)))

    def __str__(self):
        return str(self._ask("str", (self,)))


def ask(requests, replies, function, args, kwargs=None):
    """Has the program's process call a function. Lists, dicts and sets among the arguments that it changes are changed here."""
    def source(value):
        if isinstance(value, Remote):
            return value._source
        if type(value) is dict:
            return "{" + ", ".join(f"{source(key)}: {source(item)}" for key, item in value.items()) + "}"
        if type(value) in (list, tuple, set):
            return f"{type(value).__name__}([{', '.join(map(source, value))}])"
        return f"float('{value}')" if isinstance(value, float) else repr(value)

    def received(value):
        if isinstance(value, tuple) and value[:1] == (REMOTE,):
            return float(value[1]) if isinstance(value[1], str) else Remote(f"remote[{value[1]:d}]", again)
        if isinstance(value, dict):
            return {received(key): received(item) for key, item in value.items()}
        return type(value)(map(received, value)) if isinstance(value, (list, tuple, set)) else value

    def again(*call):
        return ask(requests, replies, *call)

    function = function if isinstance(function, str) else source(function)
    send(requests, f"({function}, {source(args)}, {source(kwargs or {})})")
    error, value, after = received(receive(replies, REPLY))
    if error:
        kind = getattr(builtins, error, Exception)
        raise kind(value) if isinstance(kind, type) and issubclass(kind, Exception) else Exception(value)
    for old, new in zip(args, after):
        if type(old) is type(new) and type(old) in (list, dict, set) and old != new:
            old.clear()
            old.extend(new) if type(old) is list else old.update(new)
    return value


# ---------------------------------------------------------------------------------------------- the program's process
def serve(program):
    """Runs the program, then answers calls for as long as the judge asks. What it answers is only data to the judge."""
    import types
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(program, "program.py", "exec"), module.__dict__)
    references = []

    def plain(value):
        """Data as literals of its base type; anything else stays here and goes by its number."""
        if isinstance(value, float) and not math.isfinite(value):
            return REMOTE, repr(float(value))
        for base in (bool, int, float, complex, str, bytes):
            if isinstance(value, base):
                return base(value)
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(map(plain, value))
        if isinstance(value, (set, frozenset)):
            return set(map(plain, value))
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in value.items()}
        if value is None:
            return value
        if hasattr(type(value), "__index__"):  # numpy's integers
            return int(value)
        references.append(value)
        return REMOTE, len(references) - 1

    while True:
        request = receive(3)
        try:
            function, args, kwargs = eval(request, module.__dict__, {"remote": references})
            reply = ("", plain(function(*args, **kwargs)), plain(args))
        except Exception as error:
            reply = (type(error).__name__, str(error)[:1000], ())
        send(4, reply)


# ---------------------------------------------------------------------------------------------- the walls around it
def enter_namespaces(libc):
    """Process, mount, network and IPC namespaces for the children to come; False where the kernel allows none."""
    uid, gid = os.getuid(), os.getgid()
    apart = 0x20000000 | 0x00020000 | 0x40000000 | 0x08000000  # CLONE_NEWPID, NEWNS, NEWNET, NEWIPC
    if libc.unshare(apart) == 0:
        return True
    if libc.unshare(apart | 0x10000000) != 0:  # NEWUSER, with which anyone may have the others
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as settings:
            settings.write(text)
    return True


def shut_in(libc, folder, apart):
    """Takes from this process and its children all but Python, scratch space and its processor."""
    import ctypes

    try:
        rooted = apart and not new_root(libc, folder)
    except OSError:
        rooted = False
    if not rooted:
        landlock(libc, folder)
    if os.getuid() == 0 and (rooted or world_readable(os.__file__)):  # the limit on processes does not hold for root
        nobody = 1_000_000_000 + int.from_bytes(os.urandom(3), "big")
        try:
            if not rooted:
                os.chown(".", nobody, nobody)
            os.setgroups([]), os.setresgid(nobody, nobody, nobody), os.setresuid(nobody, nobody, nobody)
        except OSError:  # a user namespace of somebody else's, in which root is the only user
            pass
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capabilities
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the judge


def must(result):
    if result < 0:
        raise OSError("the kernel does not allow it")
    return result


def new_root(libc, folder):
    """A root folder of Python and the system's libraries, read-only, and 32 MB of scratch space, for these processes alone."""
    import ctypes

    def mount(source, path, kind, flags, options=None):
        source, path, kind, options = (text and text.encode() for text in (source, path, kind, options))
        must(libc.mount(source, path, kind, ctypes.c_ulong(flags), options))

    mount(None, "/", None, 0x44000)  # MS_REC, MS_PRIVATE: nothing of this is seen outside
    mount("tmpfs", folder, "tmpfs", 0, "size=1m,mode=755")
    for path in sorted({"/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix}, key=len):
        if os.path.islink(path):
            os.symlink(os.readlink(path), folder + path)
        elif os.path.isdir(path) and not os.path.exists(folder + path):
            os.makedirs(folder + path)
            mount(path, folder + path, None, 0x5000)  # MS_BIND, MS_REC
    os.mkdir(folder + "/dev"), os.mkdir(folder + "/scratch")
    for device in ("/dev/null", "/dev/urandom"):
        os.close(os.open(folder + device, os.O_CREAT))
        mount(device, folder + device, None, 0x1000)
    # mount_setattr, recursively: MOUNT_ATTR_RDONLY, NOSUID
    must(libc.syscall(442, -100, folder.encode(), 0x8000, (ctypes.c_uint64 * 4)(1 | 2), 32))
    mount("tmpfs", folder + "/scratch", "tmpfs", 2 | 4, "size=32m,nr_inodes=4096,mode=1777")
    os.chroot(folder), os.chdir("/scratch")


def landlock(libc, folder):
    """Of all files only Python's and the system's to read, and this folder to write in; as far as the kernel has Landlock."""
    import ctypes
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset; 445: add_rule, 446: restrict_self
    if version < 1:
        return
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # the rights on files that this version knows
    known = 8 if version < 4 else 16 if version < 6 else 24  # bytes of its settings: files, from 4 on TCP, from 6 on signals
    rules = libc.syscall(444, (ctypes.c_uint64 * 3)(files, 3, 3), known, 0)
    readable = dict.fromkeys(("/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix), 1 | 4 | 8)  # run, read file, read folder
    for path, rights in {**readable, folder: files, "/dev/null": 2 | 4, "/dev/urandom": 4}.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            libc.syscall(445, rules, 1, rights.to_bytes(8, "little") + fd.to_bytes(4, "little"), 0)
    libc.prctl(38, 1, 0, 0, 0)
    libc.syscall(446, rules, 0)


def world_readable(path):
    needed = 1 if os.path.isdir(path) else 4  # to pass through a folder, to read a file
    return path == "/" or os.stat(path).st_mode & needed != 0 and world_readable(os.path.dirname(path))

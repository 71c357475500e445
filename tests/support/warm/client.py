"""Ask the server for a process, forward signals to it, and end with its status."""

import json
import os
import signal
import socket
import struct
import sys

path, *arguments = sys.argv[1:]
if arguments[0] == "-u":
    os.environ["PYTHONUNBUFFERED"] = "1"
    del arguments[0]
WARM = ("athanor", "dvc", "mlflow")
if arguments[0] != "-m" or arguments[1].split(".")[0] not in WARM:  # for the real program
    os.execv(sys.executable, [sys.executable, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect(path)
request = json.dumps([arguments[1], arguments[2:], os.getcwd(), dict(os.environ)]).encode()  # noqa: PTH109
socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
server.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = server.recv(4, socket.MSG_WAITALL)
if len(status) < 4:
    sys.exit("the server of warm processes is gone")
(code,) = struct.unpack("!i", status)
if code < 0:  # a signal ended it
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)

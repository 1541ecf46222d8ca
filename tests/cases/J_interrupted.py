"""Kind J: Ctrl-C, `--out X --resume` alone, a finished run resumed, a refused cache, what is left behind.

Right: Ctrl-C saves and says so in a line or two with code 75; `--resume` needs no other flag; no lock; files have the
user's umask; a refused `--cache` leaves nothing that blocks the next run; a finished run returns its history.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

T = Path(tempfile.mkdtemp())
(T / "text").mkdir()
for i in range(60):
    (T / f"text/{i}.txt").write_text(" ".join(f"the {i + j} quick brown foxes jump over lazy dogs." for j in range(12)))
sizes = "--model tiny --features 64 --k 4 --seq 64 --batch-size 256 --heldout-tokens 512 --ce-tokens 256 --pages 2"
start = [sys.executable, "-m", "experiments.transcoder"]
flags = [*sizes.split(), "--tokens", "25600", "--text", str(T / "text")]
out = T / "out"


def said(done):
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    last = lines[-1][:200] if lines else ""
    print(f"  code {done.returncode}, {len(lines)} line(s) of stderr; the last: {last}")


def logged():
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


print("Ctrl-C in training")
process = subprocess.Popen(
    [*start, *flags, "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
until = time.monotonic() + 120
while logged() < 2 and process.poll() is None and time.monotonic() < until:
    time.sleep(0.05)
process.send_signal(signal.SIGINT)
output, error = process.communicate(timeout=60)
said(subprocess.CompletedProcess([], process.returncode, output, error))
print("  a lock is left:", (out / "checkpoints.lock").exists())
print("--out X --resume alone")
said(subprocess.run([*start, "--out", str(out), "--resume"], capture_output=True, text=True))
print(f"  rows of the log: {logged()}; a scoreboard: {(out / 'scoreboard.json').exists()}")
usual = 0o666 & ~os.umask(0o022)
others = sorted({oct(f.stat().st_mode & 0o777) for f in out.rglob("*") if f.is_file()})
print(f"  modes of the files: {others} (usual: {oct(usual)})")
print("a refused --cache")
(T / "cache").mkdir()
(T / "cache/settings.json").write_text("{}")
again = [*start, *flags, "--out", str(T / "other"), "--cache", str(T / "cache")]
said(subprocess.run(again, capture_output=True, text=True))
print("  its folder blocks the next run:", (T / "other").exists() and any((T / "other").iterdir()))

"""A kernel that stays: dev.py start | dev.py run FIRST[-LAST] ... | dev.py list | dev.py code < text"""
import sys, json, base64, re, time, subprocess, os
from pathlib import Path
from jupyter_client import BlockingKernelClient, KernelManager
import build
here = Path("/work/nb08b"); conn = here / "kernel.json"
PATH = "\"/work/main/data/cache/flan-t5-titles\"" if os.environ.get("BYPATH", "1") == "1" else "\"flan-t5-titles\""
def client():
    c = BlockingKernelClient(connection_file=str(conn)); c.load_connection_file(); c.start_channels(); c.wait_for_ready(timeout=60); return c
def run(c, text, name):
    text = text.replace("\"flan-t5-titles\"", PATH); t = time.time(); msg = c.execute(text); n = 0; ok = True
    while True:
        m = c.get_iopub_msg(timeout=3000)
        if m["parent_header"].get("msg_id") != msg: continue
        k, d = m["msg_type"], m["content"]
        if k == "stream":
            s = d["text"]
            if not re.search(r"\d+%\|", s): print(s, end="")
        elif k in ("display_data", "execute_result"):
            data = d["data"]; html = data.get("text/html", "")
            png = re.search(r'src="data:image/png;base64,([^"]+)"', html)
            if png or "image/png" in data:
                f = here / f"fig_{name}_{n}.png"; n += 1
                f.write_bytes(base64.b64decode(png[1] if png else data["image/png"])); print("[figure]", f)
            print(data.get("text/markdown") or data.get("text/plain"))
        elif k == "error":
            print("\n".join(d["traceback"][-6:])); ok = False
        elif k == "status" and d["execution_state"] == "idle": break
    pid = (here/"kernel.pid").read_text(); st = dict(l.split(":",1) for l in open(f"/proc/{pid}/status").read().splitlines() if ":" in l)
    open(f"/proc/{pid}/clear_refs","w").write("5")
    print(f"   -- {name}: {time.time()-t:.1f} s  rss {int(st['VmRSS'].split()[0])//1024} peak {int(st['VmHWM'].split()[0])//1024} MB"); sys.stdout.flush()
    return ok
if sys.argv[1] == "start":
    if conn.exists(): conn.unlink()
    env = dict(os.environ); env.pop("MPLBACKEND", None)
    p = subprocess.Popen([sys.executable, "-m", "ipykernel_launcher", "-f", str(conn)], env=env, cwd="/tmp", stdout=open(here/"kernel.log","w"), stderr=subprocess.STDOUT, start_new_session=True)
    (here/"kernel.pid").write_text(str(p.pid)); time.sleep(4); client(); print("pid", p.pid)
elif sys.argv[1] == "list":
    for i,(k,t,g) in enumerate(build.load(sys.argv[2] if len(sys.argv)>2 else "lesson.py")): print(i, k, g, t.splitlines()[0][:90])
elif sys.argv[1] == "code":
    run(client(), sys.stdin.read(), "code")
else:
    found = build.load("solutions.py" if sys.argv[1] == "runs" else "lesson.py"); c = client()
    for a in sys.argv[2:]:
        if not a[0].isdigit():
            hit = [i for i, (k, t, g) in enumerate(found) if k == "code" and a in t]
            a = str(hit[0])
        x, y = (a.split("-") + [a])[:2] if "-" in a else (a, a)
        for i in range(int(x), int(y) + 1):
            if i >= len(found): break
            k, t, g = found[i]
            if k == "code":
                print(f"=== {i}: {t.splitlines()[0][:80]}")
                if not run(c, t, i): sys.exit(1)

"""Mixed load on `serve` for a while: memory and open files must stay flat, and the cache must be empty at the end.

soak.py PROGRAM [--seconds 600] [--real] [--concurrency 32]      (needs nothing but Python)

Without --real the server runs with --fake-runner, whose tokens cost nothing. Prints a line each ten seconds and the slope of
the resident memory over the second half; ends with 1 if anything grew or stayed.
"""

import argparse
import collections
import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

SAMPLE = 10  # Seconds between two looks.
GROWTH = 4 << 10  # KiB that the second half may bring.
WORDS = "the a cat dog river moon story house of and to in blue seven counts paper light".split()


class Load:
    def __init__(self, address, seconds):
        self.host, self.port = address.split("://")[1].rsplit(":", 1)
        self.until = time.monotonic() + seconds
        self.counts, self.lock, self.wrong = collections.Counter(), threading.Lock(), []

    def connect(self):
        return http.client.HTTPConnection(self.host, int(self.port), timeout=120)

    def count(self, name):
        with self.lock:
            self.counts[name] += 1

    def client(self, seed):
        """One client: many requests of every kind over connections that live for a while."""
        chance, connection = random.Random(seed), self.connect()
        while time.monotonic() < self.until:
            kind = chance.choices(*zip(*KINDS.items()))[0]
            try:
                kind(self, chance, connection)
            except Exception as error:  # Whatever goes wrong is told at the end.
                with self.lock:
                    self.wrong.append(f"{kind.__name__}: {error!r}")
                connection.close()
                connection = self.connect()
                time.sleep(0.1)
            self.count(kind.__name__)
            if chance.random() < 0.05:
                connection.close()
        connection.close()


def text(chance, most=60):
    return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))


def body(chance, **fields):
    sampled = {"temperature": chance.choice([0, 1]), "seed": chance.randint(0, 9), "ignore_eos": True}
    return json.dumps({"max_tokens": chance.randint(1, 120), **sampled, **fields})


def post(connection, path, data, status=200):
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    got = answer.read()
    assert answer.status == status, (answer.status, got[:200])
    return got


def completion(load, chance, connection):
    post(connection, "/v1/completions", body(chance, prompt=text(chance)))


def chat(load, chance, connection):
    post(connection, "/v1/chat/completions", body(chance, messages=[{"role": "user", "content": text(chance)}]))


def streamed(load, chance, connection):
    got = post(connection, "/v1/completions", body(chance, prompt=text(chance), stream=True, stop=["zz"]))
    assert got.endswith(b"data: [DONE]\n\n"), got[-200:]


def several(load, chance, connection):
    post(connection, "/v1/completions", body(chance, prompt=[text(chance), text(chance)], n=2, temperature=1))


def dropped(load, chance, connection):
    own = load.connect()
    own.request("POST", "/v1/completions", body(chance, prompt=text(chance), stream=True, max_tokens=900))
    own.getresponse().read(chance.randint(1, 2000))
    own.close()


def refused(load, chance, connection):
    post(connection, "/v1/completions", '{"prompt": [' + "[" * chance.randint(1, 300), 400)


def looked(load, chance, connection):
    path = chance.choice(["/metrics", "/health", "/v1/models", "/load", "/"])
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status


def watched(load, chance, connection):
    own = load.connect()
    own.request("GET", "/live")
    own.getresponse().read(5000)
    own.close()


KINDS = {completion: 6, chat: 6, streamed: 10, several: 2, dropped: 3, refused: 2, looked: 3, watched: 1}


def status(pid):
    lines = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return int(lines["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(lines["Threads"])


def slope(samples):
    """KiB a minute, by least squares."""
    times, values = zip(*samples)
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    return 60 * sum((t - middle) * (v - mean) for t, v in samples) / spread


def metric(load, name):
    connection = load.connect()
    connection.request("GET", "/metrics")
    found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", connection.getresponse().read().decode(), re.M)
    connection.close()
    return float(found[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--real", action="store_true", help="the demo model instead of the fake runner")
    arguments = parser.parse_args()
    flags = ["--max-num-seqs", "64"] + ([] if arguments.real else ["--fake-runner", "--fake-step-ms", "1"])
    command = [arguments.program, "serve", "--cpu", "--max-model-len", "1024", "--host", "127.0.0.1", "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "error"})
    try:
        load = Load(server.stdout.readline().split(" at ")[1].strip(), arguments.seconds)
        idle = status(server.pid)
        print(f"idle: {idle[0]} KiB, {idle[1]} files, {idle[2]} threads", flush=True)
        clients = [threading.Thread(target=load.client, args=(seed,)) for seed in range(arguments.concurrency)]
        for client in clients:
            client.start()
        samples, started = [], time.monotonic()
        while time.monotonic() < load.until - SAMPLE / 2:
            time.sleep(min(SAMPLE, max(0, load.until - time.monotonic())))
            rss, files, threads = status(server.pid)
            samples.append((time.monotonic() - started, rss))
            done = sum(load.counts.values())
            print(f"{samples[-1][0]:5.0f} s  {rss} KiB  {files} files  {threads} threads  {done} requests", flush=True)
        for client in clients:
            client.join()
        for _ in range(600):
            names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
            left = {name: metric(load, name) for name in names}
            end = status(server.pid)
            if not any(left.values()) and end[1] <= idle[1] + 1:
                break
            time.sleep(0.1)
        half = samples[len(samples) // 2 :]
        rise = slope(half) * (half[-1][0] - half[0][0]) / 60
        print(f"requests: {dict(load.counts)}, {len(load.wrong)} went wrong: {load.wrong[:5]}")
        print(f"resident memory over the second half: {slope(half):+.0f} KiB a minute, {rise:+.0f} KiB in all")
        print(f"at the end: {end[0]} KiB, {end[1]} files, {end[2]} threads, {left}")
        good = rise < GROWTH and end[1] <= idle[1] + 1 and not any(left.values()) and not load.wrong
        print("flat" if good else "NOT flat")
    finally:
        server.terminate()
        server.wait(60)
    sys.exit(0 if good and server.returncode == 0 else 1)


if __name__ == "__main__":
    main()

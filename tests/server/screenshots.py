"""The pictures of the web page in docs/images: `python -m tests.server.screenshots MODEL FOLDER`.

Two servers with the same model, w8a8kv8 and w8a8kv4; what the pictures show is what these brought.
"""

import sys
import tempfile
import threading
from pathlib import Path

from tests.server.browser import Page, chromium
from tests.server.harness import Server, free_ports, serving

SYSTEM = "You are a patient teacher. You answer in plain words, and you say so when you do not know something. " * 4
TOPICS = ("the sea", "bread", "a lighthouse", "two mice", "the moon", "a long winter")


def take(page: Page, path: Path) -> None:
    """Keep what the browser shows, in few colours: pictures in a repository should be small."""
    from PIL import Image

    page.driver.save_screenshot(str(path))
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def ask(server: Server, topic: str) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Tell me a story about {topic}."}]
    body = {"messages": messages, "max_tokens": 200, "temperature": 0.8, "ignore_eos": True}
    server.post("/v1/chat/completions", body, timeout=300)


def chat(page: Page, url: str, folder: Path) -> None:
    page.open(url)
    page.get("settings-button").click()
    page.get("temperature").send_keys("0")
    page.get("max_tokens").send_keys("160")
    page.get("settings-button").click()
    page.send("Explain in two sentences why the sky is blue, then list three things that are blue.")
    page.answered()
    take(page, folder / "page-chat.png")


def engine(page: Page, server: Server, folder: Path) -> None:
    page.open(server.url + "/#engine")
    threads = [threading.Thread(target=ask, args=(server, topic), daemon=True) for topic in TOPICS]
    for number, thread in enumerate(threads, 1):
        thread.start()
        page.until(f"Number(document.getElementById('running').textContent) >= {number}")
    page.until("past.itl.filter((one) => one).length > 100")
    take(page, folder / "page-engine.png")
    for thread in threads:
        thread.join()


def compare(page: Page, url: str, other: str, folder: Path) -> None:
    page.open(url + "/#engine")
    page.get("c-url").send_keys(other)
    page.get("c-run").click()
    page.until("/^(The answers|No diff)/.test(document.getElementById('verdict').textContent)")
    page.run("document.getElementById('verdict').scrollIntoView({block: 'end'})")
    take(page, folder / "page-compare.png")


def main(model: str, folder: Path) -> None:
    ports = free_ports(2)
    settings = [
        {
            "model": model,
            "options": {"precision": precision, "max_model_len": 2048, "kv_cache_memory_bytes": 200_000_000},
            "server": {"port": port, "allowed_origins": [f"http://127.0.0.1:{other}"]},
        }
        for precision, port, other in zip(("w8a8kv8", "w8a8kv4"), ports, reversed(ports), strict=True)
    ]
    with serving(**settings[0]) as one, serving(**settings[1]) as two, tempfile.TemporaryDirectory() as profile:
        with chromium(Path(profile, "light")) as page:
            chat(page, one.url, folder)
            compare(page, one.url, two.url, folder)
        with chromium(Path(profile, "dark"), dark=True) as page:
            engine(page, one, folder)
        with chromium(Path(profile, "phone"), width=390, height=780) as page:
            page.open(one.url)
            page.send("What is a KV cache?")
            page.until("document.querySelector('.turn.assistant .text').textContent.length > 200")
            take(page, folder / "page-phone.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

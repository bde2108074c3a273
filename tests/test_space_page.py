"""The Space as `make space` assembles it, started by itself and used as a person would use it, in a browser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

SPACE = Path(__file__).parent.parent / "build" / "space"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 180_000  # milliseconds, on a busy machine
pytestmark = pytest.mark.space


@pytest.fixture(scope="module")
def address():
    """Of the page, from a process that has only what is in the folder of the Space, and no network for the Hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "app.py"]
    with subprocess.Popen(
        command, cwd=SPACE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        said = ""
        try:
            for line in server.stdout:
                said += line
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield found[0]
                    break
            else:
                raise AssertionError(said)
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(address):
    """The page in Chromium, and after the tests: no error in it, and nothing asked of another host."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(WAIT)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        yield page
        assert errors == []
        assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()


def test_the_package_of_the_space_is_its_own(address):
    command = [sys.executable, "-c", "import mmgem, album; print(mmgem.__file__)"]
    result = subprocess.run(command, cwd=SPACE, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).is_relative_to(SPACE)
    with urlopen(address) as answer:
        assert "Search photographs, and ask about them" in answer.read().decode()  # of its configuration


def test_words_find_a_photograph_that_is_chosen_and_looked_into(page):
    page.get_by_label("Words").first.fill("a cat")
    page.get_by_label("Show why").check()
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#results .caption-label", has_text="0.").first.wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=SPACE / "search.png")
    names = page.locator("#results .caption-label").all_inner_texts()
    scores = [float(name.split()[0]) for name in names]  # which photograph is first is the model's business
    assert len(names) == 12 and scores == sorted(scores, reverse=True)
    page.locator("#results button").first.click()
    page.locator("#picker img").wait_for()
    assert page.get_by_label("Caption", exact=True).input_value()


def test_a_picture_is_searched_for(page):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Words").first.fill("")
    page.get_by_label("Show why").uncheck()
    page.locator("input[type=file]").first.set_input_files(SPACE / "photographs" / "coffee.png")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#results .caption-label", has_text="1.00").first.wait_for()
    assert page.locator("#results .caption-label").first.inner_text().endswith("coffee.png")


def test_a_box_is_drawn_captioned_and_searched_for(page):
    page.locator("#results button").first.click()  # coffee.png, by the search before
    page.locator("#picker img").wait_for()
    page.wait_for_function("document.querySelector('#picker img').naturalWidth === 600")
    image = page.locator("#picker img").bounding_box()
    left, top, width, height = (image[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(left + 0.2 * width, top + 0.1 * height)
    page.mouse.down()
    page.mouse.move(left + 0.6 * width, top + 0.6 * height, steps=4)
    page.mouse.up()
    page.locator("#regions .caption-label").nth(3).wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=SPACE / "boxes.png")
    corners = [float(edge) for edge in page.get_by_label("Box: left").input_value().split(",")]
    sides = page.locator("#picker img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    expected = [share * side for share, side in zip([0.2, 0.1, 0.6, 0.6], sides * 2, strict=True)]
    assert corners == pytest.approx(expected, abs=4)
    assert page.get_by_label("Caption of the box").input_value()
    names = page.locator("#regions .caption-label").all_inner_texts()
    assert len({name.split()[-1] for name in names}) == 4 and not any("coffee" in name for name in names)
    drawn = page.locator("#picker .box").bounding_box()
    assert drawn["width"] == pytest.approx(0.4 * width, abs=2) and drawn["x"] == pytest.approx(
        left + 0.2 * width, abs=2
    )


def test_labels_are_compared_questions_answered_and_words_pointed_at(page):
    page.get_by_role("tab", name="Labels").click()
    page.get_by_label("Labels, with").fill("a cat, a rocket")
    page.get_by_label("Labels, with").press("Enter")
    page.get_by_text("a rocket", exact=True).first.wait_for()
    assert page.get_by_test_id("label-output-value").inner_text() in ("a cat", "a rocket")
    page.get_by_role("tab", name="Questions").click()
    page.get_by_label("Question", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('[data-testid=textbox][disabled]') !== null")
    page.get_by_role("tab", name="Heat map").click()
    page.get_by_label("What to look for").fill("eyes")
    page.get_by_label("What to look for").press("Enter")
    page.locator("#heat img").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=SPACE / "heat_map.png")
    page.get_by_role("tab", name="Questions").click()
    assert page.get_by_label("Answer").input_value()


def test_a_mistake_is_said_in_a_sentence(page):
    page.get_by_role("tab", name="Labels").click()
    page.get_by_label("Labels, with").fill("a cat")
    page.get_by_label("Labels, with").press("Enter")
    page.get_by_text("expected two or more, to choose from").wait_for()

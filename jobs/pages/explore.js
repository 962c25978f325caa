// Finding while typing, the mix, and thumbs. Without this script the page still finds, walks and compares.
"use strict";

const find = document.getElementById("find");
const found = document.getElementById("found");
let asked = 0;
let chosen = -1;

function hide() {
  found.hidden = true;
  find.setAttribute("aria-expanded", "false");
  find.removeAttribute("aria-activedescendant");
  chosen = -1;
}

function choose(index) {
  const options = [...found.children];
  chosen = (index + options.length) % options.length;
  options.forEach((option, place) => option.setAttribute("aria-selected", String(place === chosen)));
  find.setAttribute("aria-activedescendant", options[chosen].id);
  options[chosen].scrollIntoView({ block: "nearest" });
}

function walk(item) {
  const here = new URLSearchParams(location.search);
  here.delete("q");
  here.delete("mix");
  here.set("item", item);
  location.assign("/?" + here);
}

function show(items) {
  const kept = chosen < 0 ? null : found.children[chosen].dataset.item;
  found.replaceChildren(...items.map((item, place) => {
    const option = document.createElement("li");
    const about = document.createElement("small");
    option.id = "found-" + place;
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.dataset.item = item.item_id;
    option.textContent = item.title;
    about.textContent = [item.category, item.item_id].filter(Boolean).join(" · "); // titles may be equal
    option.append(about);
    return option;
  }));
  found.hidden = items.length === 0;
  find.setAttribute("aria-expanded", String(items.length > 0));
  chosen = -1;
  const again = items.findIndex((item) => item.item_id === kept); // an answer that comes late must not undo a choice
  if (again >= 0) choose(again);
}

find.addEventListener("input", async () => {
  const mine = ++asked;
  if (!find.value.trim()) return hide();
  const answer = await fetch("/search?" + new URLSearchParams({ q: find.value }));
  if (mine === asked && answer.ok) show(await answer.json());
});

find.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (found.hidden) return;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    choose(chosen + (event.key === "ArrowDown" ? 1 : chosen < 0 ? 0 : -1));
  } else if (event.key === "Enter" && chosen >= 0) {
    event.preventDefault();
    walk(found.children[chosen].dataset.item);
  }
});

find.addEventListener("blur", () => setTimeout(hide, 150));
found.addEventListener("mousedown", (event) => {
  const option = event.target.closest("li");
  if (option) walk(option.dataset.item);
});

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select, textarea") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    find.select();
    find.focus();
  }
});

const controls = document.querySelector(".controls");
const said = document.getElementById("said");

if (controls) {
  controls.querySelector("button[type=submit]").hidden = true;
  controls.addEventListener("change", (event) => {
    if (event.target.matches("select")) go(event.target.name, event.target.value);
  });
  mixes();
}

function go(name, value) {
  const here = new URLSearchParams(location.search);
  if (value) here.set(name, value);
  else here.delete(name);
  location.assign("/?" + here);
}

async function mixes() {
  const slider = document.getElementById("mix-value");
  const item = controls.querySelector("[name=item]").value;
  const answer = await fetch("/mixes?" + new URLSearchParams({ item, k: slider.dataset.k || "0" }));
  const made = await answer.json();
  if (!answer.ok) {
    said.textContent += " The mix cannot be moved: " + made.error;
    return;
  }
  const list = document.querySelector("#list-merged ol");
  if (!list) return;
  const control = document.getElementById("mix");
  const name = control.querySelector("b");
  const own = made.values.findIndex((mix) => mix.value === made.own);
  const published = slider.dataset.mix === "" ? list.innerHTML : made.values[own].html;
  const wanted = slider.dataset.mix === "" ? made.own : Number(slider.dataset.mix);
  slider.max = made.values.length - 1;
  const distances = made.values.map((mix) => Math.abs(mix.value - wanted));
  slider.value = distances.indexOf(Math.min(...distances));
  const words = (mix) => (made.kind === "blend" ? "λ = " : "relevance share ") + mix.value;
  const tell = () => {
    const mix = made.values[slider.value];
    name.textContent = words(mix) + (mix.value === made.own ? " (as published)" : "");
    slider.setAttribute("aria-valuetext", name.textContent);
    return mix;
  };
  slider.addEventListener("input", () => {
    const mix = tell();
    list.innerHTML = mix.value === made.own ? published : mix.html; // drawn by the server's template, which escapes
    said.textContent = mix.value === made.own
      ? "The merged list as published."
      : mix.num_changed + " of the " + list.children.length + " merged neighbors shown are not among the first published ones.";
    const here = new URLSearchParams(location.search);
    if (mix.value === made.own) here.delete("mix");
    else here.set("mix", mix.value);
    history.replaceState(null, "", "/?" + here);
    document.querySelectorAll(".exports a").forEach((link) => {
      here.set("format", new URLSearchParams(link.search).get("format"));
      link.search = here;
    });
  });
  tell();
  control.hidden = false;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest(".thumbs button");
  if (!button) return;
  const entry = button.closest(".neighbor");
  const grade = button.getAttribute("aria-pressed") === "true" ? null : Number(button.dataset.grade);
  const vote = { item_id: controls.querySelector("[name=item]").value, other_item_id: entry.dataset.item, grade, head: entry.dataset.head };
  const answer = await fetch("/feedback", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(vote) });
  if (!answer.ok) {
    const problem = await answer.json();
    said.textContent = "The vote was not kept: " + (problem.error || "the server refused it");
    return;
  }
  document.querySelectorAll(".neighbor").forEach((other) => {
    if (other.dataset.item !== vote.other_item_id) return;
    other.querySelectorAll(".thumbs button").forEach((thumb) => {
      thumb.setAttribute("aria-pressed", String(grade !== null && Number(thumb.dataset.grade) === grade));
    });
  });
  said.textContent = grade === null ? "Vote taken back." : "Vote kept: the next night's relevance head learns from it.";
});

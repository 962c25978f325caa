// What a number means, for fingers and keyboards: a tap or the focus shows what pointing at it says. Without this script pointing still works.
"use strict";

(() => {
  const ACTS = "a, button, input, select, option, summary, label"; // a tap on these does something else
  const bubble = document.createElement("div");
  bubble.id = "definition";
  bubble.popover = "manual"; // above everything, so that no scrolling table cuts it off
  bubble.setAttribute("role", "tooltip");
  document.body.append(bubble);
  let shown = null;

  const explained = (target) => {
    const element = target.closest("[title]");
    return element && !element.matches(ACTS) ? element : null;
  };

  const place = () => {
    const over = shown.getBoundingClientRect();
    const room = { width: document.documentElement.clientWidth, height: document.documentElement.clientHeight };
    const below = over.bottom + 6 + bubble.offsetHeight <= room.height;
    bubble.style.left = Math.max(8, Math.min(over.left, room.width - bubble.offsetWidth - 8)) + "px";
    bubble.style.top = Math.max(8, below ? over.bottom + 6 : over.top - bubble.offsetHeight - 6) + "px";
  };

  const hide = () => {
    if (!shown) return;
    shown.removeAttribute("aria-describedby");
    shown = null;
    bubble.hidePopover();
  };

  const show = (element) => {
    if (shown === element) return;
    hide();
    shown = element;
    bubble.textContent = element.title;
    element.setAttribute("aria-describedby", bubble.id);
    bubble.showPopover();
    place();
  };

  // Of a column of numbers that mean the same only the first is a stop of the Tab key; all of them can be tapped.
  const addStops = () => {
    const known = new Map();
    for (const element of document.querySelectorAll("[title]")) {
      if (element.matches(ACTS) || element.closest("svg")) continue;
      const group = element.closest("table, section, dl, main") || document.body;
      const meanings = known.get(group) || known.set(group, new Set()).get(group);
      if (!meanings.has(element.title)) element.tabIndex = 0;
      meanings.add(element.title);
    }
  };

  addStops();
  new MutationObserver(addStops).observe(document.querySelector("main"), { childList: true, subtree: true });
  document.addEventListener("focusin", (event) => (explained(event.target) ? show(explained(event.target)) : hide()));
  document.addEventListener("focusout", hide);
  document.addEventListener("click", (event) => (explained(event.target) ? show(explained(event.target)) : hide()));
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", () => shown && place(), true);
})();

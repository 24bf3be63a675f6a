"use strict";
// What a spot of a figure says, beside the pointer, under the finger, or by the arrow keys in a figure that has the focus.
(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (spot, x, y) => {
    tip.textContent = spot.dataset.tip;
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const left = Math.min(Math.max(4, x + 12), document.documentElement.clientWidth - width - 4);
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${y > height + 20 ? y - height - 12 : y + 20}px`;
  };
  // A browser's own tooltip would come on top; without this script it is the only one.
  for (const title of document.querySelectorAll(".spot > title")) title.remove();

  document.addEventListener("pointermove", (event) => {
    const spot = event.target.closest?.(".spot");
    if (spot) show(spot, event.clientX, event.clientY); else if (event.pointerType === "mouse") hide();
  });
  document.addEventListener("pointerdown", (event) => {
    const spot = event.target.closest?.(".spot");
    if (spot) show(spot, event.clientX, event.clientY); else hide();
  });
  const follow = () => {
    const spot = document.activeElement?.closest(".spot");
    if (!spot) { hide(); return; }
    const box = spot.getBoundingClientRect();
    show(spot, box.left + box.width / 2, box.top + Math.min(box.height / 2, 24));
  };
  document.addEventListener("focusin", follow);
  document.addEventListener("scroll", follow, { passive: true });
  document.addEventListener("keydown", (event) => {
    const chart = event.target.closest?.(".chart");
    if (!chart) return;
    if (event.key === "Escape") { hide(); chart.focus(); return; }
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const spots = [...chart.querySelectorAll(".spot")];
    const at = spots.indexOf(event.target);
    spots[at < 0 ? (step > 0 ? 0 : spots.length - 1) : (at + step + spots.length) % spots.length]?.focus({ preventScroll: true });
  });

  // Paper shows what a reader would have opened.
  const closed = [];
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details:not([open])")) { each.open = true; closed.push(each); }
  });
  addEventListener("afterprint", () => { for (const each of closed.splice(0)) each.open = false; });
})();

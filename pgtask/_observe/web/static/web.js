"use strict";
// Fetches the live part of the page again every two seconds, unless the page is hidden.
(() => {
  const live = document.getElementById("live");
  const note = document.getElementById("status");
  if (!live || !live.firstElementChild || document.querySelector("[role=alert]")) return;
  const PERIOD = 2000;
  let timer = 0;
  let shown = "";

  // A reader who has selected text or opened a menu in it keeps what is there.
  const isInUse = () => {
    const selection = document.getSelection();
    return Boolean(selection && !selection.isCollapsed && live.contains(selection.anchorNode));
  };

  const replace = (text) => {
    const at = live.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const scrolled = [...live.querySelectorAll(".wide")].map((part) => part.scrollLeft);
    live.innerHTML = text;
    [...live.querySelectorAll(".wide")].forEach((part, number) => { part.scrollLeft = scrolled[number] || 0; });
    if (at) [...live.querySelectorAll("a")].find((link) => link.getAttribute("href") === at)?.focus();
  };

  const refresh = async () => {
    timer = 0;
    if (document.hidden) return;
    try {
      if (!isInUse()) {
        const answer = await fetch(location.href, { headers: { "X-Fragment": "1" }, signal: AbortSignal.timeout(10000) });
        const text = await answer.text();
        if (!answer.ok) throw new Error(`${answer.status}`);
        if (text !== shown && !isInUse()) replace(text);
        shown = text;
      }
      note.textContent = `live, as of ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      note.textContent = `not refreshed since: ${error.message}`;
    }
    schedule();
  };

  const schedule = () => {
    if (!timer && !document.hidden) timer = setTimeout(refresh, PERIOD);
  };

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    timer = 0;
    if (document.hidden) note.textContent = "paused";
    else refresh();
  });
  schedule();
})();

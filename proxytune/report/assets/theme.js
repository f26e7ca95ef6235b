// The colour scheme, before anything is painted: what was chosen last time, else what the system prefers.
(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let kept = "auto";
  try { kept = localStorage.getItem("proxytune-theme") || "auto"; } catch { /* no storage for files here */ }
  const names = { auto: "as the system", light: "light", dark: "dark" };
  const apply = () => {
    const shown = kept === "auto" ? (dark.matches ? "dark" : "light") : kept;
    document.documentElement.dataset.theme = shown;
    const button = document.getElementById("theme");
    if (!button) return;
    const which = document.createElement("span");
    which.textContent = `: ${names[kept] || kept}`;
    button.replaceChildren("Theme", which);
  };
  dark.addEventListener("change", apply);
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme")?.addEventListener("click", () => {
      const order = dark.matches ? ["auto", "light", "dark"] : ["auto", "dark", "light"];
      kept = order[(order.indexOf(kept) + 1) % order.length];
      try { localStorage.setItem("proxytune-theme", kept); } catch { /* kept for this visit only */ }
      apply();
    });
  });
})();

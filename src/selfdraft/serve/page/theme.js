// Not a module: it must set the theme before the first paint.
"use strict";
try {
  const theme = localStorage.getItem("selfdraft.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is switched off: the browser's own preference holds
}

// The pointer over a chart shows the values there; the switch above the charts chooses their x axis. Everything is in the page.
"use strict";
(function () {
  function compact(n) {
    const a = Math.abs(n);
    for (const [limit, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (a >= limit) return String(+(n / limit).toPrecision(4)) + suffix;
    }
    return String(+n.toPrecision(4));
  }
  function clock(s) {
    const t = Math.round(s), two = (n) => String(n).padStart(2, "0");
    if (t < 60) return t + " s";
    if (t < 3600) return Math.floor(t / 60) + ":" + two(t % 60) + " min";
    return Math.floor(t / 3600) + ":" + two(Math.floor((t % 3600) / 60)) + " h";
  }
  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] > x) high = middle; else low = middle;
    }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  }
  function element(name, kind, text) {
    const made = document.createElement(name);
    made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  for (const plot of document.querySelectorAll(".plot[data-values]")) {
    const area = plot.querySelector(".area"), onTime = plot.dataset.axis === "time";
    let values = null, line = null, tip = null;
    const place = (x) => (x - values.x[0]) / (values.x[1] - values.x[0]);
    function show(share) {
      values = values || JSON.parse(plot.dataset.values);
      if (!line) {
        line = element("div", "hair");
        tip = element("div", "tip");
        area.append(line, tip);
      }
      const wanted = values.x[0] + share * (values.x[1] - values.x[0]);
      const near = values.series.map((s) => [s, nearest(s[2], wanted)]);
      const best = near.reduce((a, b) => Math.abs(a[0][2][a[1]] - wanted) <= Math.abs(b[0][2][b[1]] - wanted) ? a : b);
      const x = best[0][2][best[1]], reach = (values.x[1] - values.x[0]) / 40;
      line.style.left = 100 * place(x) + "%";
      tip.replaceChildren(element("strong", "", onTime ? clock(x) : compact(x) + " tokens"));
      for (const [s, at] of near) {
        if (Math.abs(s[2][at] - x) > reach) continue;
        const row = element("span", ""), sign = element("i", "");
        sign.style.background = s[1];
        row.append(sign, s[0] + " ", element("em", "", compact(s[3][at])));
        tip.append(row);
      }
      for (const [name, when] of values.moments) {
        if (Math.abs(when - x) <= reach / 2) tip.append(element("small", "", name));
      }
      tip.classList.toggle("left", place(x) > 0.5);
      tip.style.left = 100 * place(x) + "%";
      line.hidden = tip.hidden = false;
      plot.dataset.at = x;
    }
    const hide = () => { if (line) line.hidden = tip.hidden = true; };
    const move = (event) => {
      const box = area.getBoundingClientRect();
      show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    };
    area.addEventListener("pointermove", move);
    area.addEventListener("pointerdown", move);
    area.addEventListener("pointerleave", hide);
    area.addEventListener("blur", hide);
    area.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      values = values || JSON.parse(plot.dataset.values);
      const at = plot.dataset.at === undefined ? 0.5 : place(+plot.dataset.at);
      show(Math.min(1, Math.max(0, at + way / 50)));
    });
  }

  const key = "axis of " + location.pathname;
  function choose(axis) {
    document.body.classList.toggle("over-time", axis === "time");
    try { sessionStorage.setItem(key, axis); } catch (error) { /* a page from a file may keep nothing */ }
  }
  let kept = null;
  try { kept = sessionStorage.getItem(key); } catch (error) { /* as above */ }
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.checked = input.value === (kept || "tokens");
    input.addEventListener("change", () => choose(input.value));
  }
  if (document.querySelector("input[name=axis]")) choose(kept || "tokens");
})();

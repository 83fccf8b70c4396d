// What the page does beyond being read: arms shown and hidden, another x axis, sorting, downloads,
// values under the pointer, the theme. Without it everything is there to read.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const arms = JSON.parse(document.getElementById("arms").textContent);
  const hidden = new Set();
  let axis = "step";
  root.classList.add("js");

  // ---- theme

  const themes = ["auto", "light", "dark"];
  const themeButton = document.getElementById("theme");
  const setTheme = (theme) => {
    if (theme === "auto") root.removeAttribute("data-theme");
    else root.dataset.theme = theme;
    themeButton.dataset.now = theme;
    themeButton.textContent = `theme: ${theme}`;
  };
  themeButton.addEventListener("click", () => {
    const next = themes[(themes.indexOf(themeButton.dataset.now) + 1) % themes.length];
    setTheme(next);
    try { localStorage.setItem("obm-page-theme", next); } catch { /* not allowed here */ }
  });
  let stored = null;
  try { stored = localStorage.getItem("obm-page-theme"); } catch { /* not allowed here */ }
  setTheme(themes.includes(stored) ? stored : "auto");

  // ---- contents

  const links = new Map(all("nav.contents a").map((a) => [a.getAttribute("href").slice(1), a]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.get(entry.target.id);
      if (link) link.classList.toggle("here", entry.isIntersecting);
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of all("main > section[id]")) watcher.observe(section);
  const wide = window.matchMedia("(min-width: 1100px)");
  const openContents = () => { document.querySelector("nav.contents details").open = wide.matches; };
  wide.addEventListener("change", openContents);
  openContents();

  // ---- arms

  const showArms = () => {
    for (const element of all("[data-arm]")) {
      element.classList.toggle("off", hidden.has(Number(element.dataset.arm)));
    }
    for (const chip of all(".legend button[data-toggle]")) {
      chip.setAttribute("aria-pressed", String(!hidden.has(Number(chip.dataset.toggle))));
    }
    for (const figure of all("figure.curves")) drawCurves(figure);
  };
  for (const chip of all(".legend button[data-toggle]")) {
    const arm = Number(chip.dataset.toggle);
    chip.addEventListener("click", () => {
      if (hidden.has(arm)) hidden.delete(arm);
      else hidden.add(arm);
      showArms();
    });
    chip.addEventListener("dblclick", () => {
      arms.forEach((_, other) => (other === arm ? hidden.delete(other) : hidden.add(other)));
      showArms();
    });
  }
  for (const button of all(".legend button[data-all]")) {
    button.addEventListener("click", () => {
      hidden.clear();
      showArms();
    });
  }

  // ---- curves

  const units = {
    step: ["optimizer steps", 1],
    tokens: ["tokens sampled by the policy", 1],
    device_s: ["device-seconds, preparation included", 1],
  };
  const unitOf = (figure, column) => {
    if (column !== "device_s") return units[column];
    const most = Math.max(...[...curvesOf(figure).values()].flat().map((entry) => entry.device_s));
    if (most < 120) return units.device_s;
    const [name, divisor] = most < 7200 ? ["minutes", 60] : ["hours", 3600];
    return [`device-${name}, preparation included`, divisor];
  };
  const dataOf = (figure) => {
    if (!figure.parsed) figure.parsed = JSON.parse(figure.querySelector("script.data").textContent);
    return figure.parsed;
  };
  const curvesOf = (figure) => {
    if (figure.grouped) return figure.grouped;
    const { columns, rows } = dataOf(figure);
    const grouped = new Map();
    for (const row of rows) {
      const entry = Object.fromEntries(columns.map((column, i) => [column, row[i]]));
      const arm = arms.indexOf(entry.arm);
      if (!grouped.has(arm)) grouped.set(arm, []);
      grouped.get(arm).push(entry);
    }
    figure.grouped = grouped;
    return grouped;
  };
  const xColumn = (figure) => {
    const { columns, rows } = dataOf(figure);
    const at = columns.indexOf(axis);
    return at >= 0 && rows.every((row) => row[at] !== null) ? axis : "step";
  };
  const short = (value) => {
    const size = Math.abs(value);
    for (const [bound, by, unit] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]]) {
      if (size >= bound) return `${Number((value / by).toPrecision(4))}${unit}`;
    }
    return String(Number(value.toPrecision(4))).replace("-", "−");
  };
  const ticks = (low, high, about) => {
    if (!(high > low)) return [low];
    const raw = (high - low) / about;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const first = Math.ceil(low / step - 1e-9);
    const last = Math.floor(high / step + 1e-9);
    if (last <= first && about < 64) return ticks(low, high, 2 * about);
    return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
  };
  const geometry = (figure, svg) => {
    const [left, top, right, bottom] = svg.dataset.plot.split(" ").map(Number);
    const [yLow, yHigh] = svg.dataset.y.split(" ").map(Number);
    const column = xColumn(figure);
    const [label, divisor] = unitOf(figure, column);
    const values = [];
    for (const [arm, entries] of curvesOf(figure)) {
      if (!hidden.has(arm)) values.push(...entries.map((entry) => entry[column] / divisor));
    }
    const xLow = values.length ? Math.min(...values) : 0;
    const xHigh = values.length ? Math.max(...values) : 1;
    return {
      left, top, right, bottom, column, label, divisor, xLow, xHigh,
      x: (value) => left + ((value / divisor - xLow) / (xHigh - xLow || 1)) * (right - left),
      y: (value) => bottom - ((value - yLow) / (yHigh - yLow || 1)) * (bottom - top),
    };
  };
  const fixed = (value) => value.toFixed(1).replace(/\.0$/, "");
  const line = (points) => (points.length ? `M${points.map((p) => p.map(fixed).join(" ")).join("L")}` : "");
  const drawCurves = (figure) => {
    for (const svg of all("svg.lines", figure)) {
      const g = geometry(figure, svg);
      const labels = svg.querySelector("g.x");
      labels.replaceChildren(
        ...ticks(g.xLow, g.xHigh, Math.max(2, Math.floor((g.right - g.left) / 75))).map((value) => {
          const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
          text.setAttribute("x", fixed(g.x(value * g.divisor)));
          text.setAttribute("y", g.bottom + 17);
          text.setAttribute("text-anchor", "middle");
          text.textContent = short(value);
          return text;
        }),
      );
      svg.querySelector("text.name").textContent = g.label;
      for (const group of all(":scope > g[data-arm]:not(.end)", svg)) {
        const entries = curvesOf(figure).get(Number(group.dataset.arm)) || [];
        const known = entries.filter((e) => e.mean !== null);
        const banded = known.filter((e) => e.low !== null && e.high !== null);
        const band = group.querySelector(".band");
        if (band) {
          const upper = banded.map((e) => [g.x(e[g.column]), g.y(e.high)]);
          const lower = banded.map((e) => [g.x(e[g.column]), g.y(e.low)]).reverse();
          band.setAttribute("d", `${line([...upper, ...lower])}Z`);
        }
        for (const path of all(".seed", group)) {
          const key = `seed_${path.dataset.seed}`;
          const seen = entries.filter((e) => e[key] !== null && e[key] !== undefined);
          path.setAttribute("d", line(seen.map((e) => [g.x(e[g.column]), g.y(e[key])])));
        }
        const mean = known.map((e) => [g.x(e[g.column]), g.y(e.mean)]);
        group.querySelector(".mean").setAttribute("d", line(mean));
        const marks = group.querySelector(".mark");
        const every = Number(marks.dataset.every);
        marks.setAttribute("d", mean.filter((_, i) => i % every === 0)
          .map(([x, y]) => `M${fixed(x)} ${fixed(y)}${marks.dataset.shape}`).join(""));
      }
    }
  };
  for (const choice of all("input[name=axis]")) {
    choice.addEventListener("change", () => {
      axis = choice.value;
      for (const figure of all("figure.curves")) drawCurves(figure);
    });
  }

  // ---- values under the pointer

  const tip = document.getElementById("tip");
  const showTip = (nodes, x, y) => {
    tip.replaceChildren(...nodes);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > window.innerWidth ? x - 16 - box.width : x + 16;
    tip.style.left = `${Math.max(4, Math.min(left, window.innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - box.height - 4))}px`;
  };
  const hideTip = () => {
    tip.hidden = true;
    for (const cross of all(".cross")) cross.setAttribute("visibility", "hidden");
  };
  const element = (name, text, cssClass) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (cssClass) made.className = cssClass;
    return made;
  };
  const swatches = new Map(
    all(".legend button[data-toggle]").map((b) => [Number(b.dataset.toggle), b.querySelector("svg")]),
  );
  const labels = new Map(
    all(".legend button[data-toggle]").map((b) => [Number(b.dataset.toggle), b.dataset.label]),
  );
  const readCurves = (figure, svg, wanted, x, y) => {
    const g = geometry(figure, svg);
    let nearest = null;
    for (const [arm, entries] of curvesOf(figure)) {
      if (hidden.has(arm)) continue;
      for (const entry of entries) {
        const distance = Math.abs(g.x(entry[g.column]) - wanted);
        if (!nearest || distance < nearest.distance) nearest = { distance, at: entry[g.column] };
      }
    }
    if (!nearest) return null;
    const cross = svg.querySelector(".cross");
    const at = fixed(g.x(nearest.at));
    cross.setAttribute("d", `M${at} ${g.top}V${g.bottom}`);
    cross.setAttribute("visibility", "visible");
    const lines = [];
    for (const [arm, entries] of curvesOf(figure)) {
      if (hidden.has(arm)) continue;
      const entry = entries.reduce((best, e) =>
        Math.abs(e[g.column] - nearest.at) < Math.abs(best[g.column] - nearest.at) ? e : best);
      if (entry.mean === null) continue;
      const row = element("div", "", "tip-row");
      if (swatches.get(arm)) row.append(swatches.get(arm).cloneNode(true));
      row.append(element("span", labels.get(arm) || arms[arm]), element("b", entry.mean.toFixed(3)));
      if (entry.low !== null && entry.low !== entry.high) {
        row.append(element("small", `${entry.low.toFixed(2)} to ${entry.high.toFixed(2)}`));
      }
      lines.push([entry.mean, row]);
    }
    lines.sort((a, b) => b[0] - a[0]);
    const head = element("strong", `${g.label.split(",")[0]}: ${short(nearest.at / g.divisor)}`);
    showTip([head, ...lines.map((entry) => entry[1])], x, y);
    return nearest.at;
  };
  for (const figure of all("figure.curves")) {
    for (const svg of all("svg.lines", figure)) {
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const wanted = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
        readCurves(figure, svg, wanted, event.clientX, event.clientY);
      });
      svg.addEventListener("pointerleave", hideTip);
      svg.addEventListener("blur", hideTip);
      svg.addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        event.preventDefault();
        const g = geometry(figure, svg);
        const known = [...new Set([...curvesOf(figure)].filter(([arm]) => !hidden.has(arm))
          .flatMap(([, entries]) => entries.map((e) => e[g.column])))].sort((a, b) => a - b);
        const step = event.key === "ArrowRight" ? 1 : -1;
        const start = svg.place === undefined ? (step > 0 ? -1 : known.length) : svg.place;
        svg.place = Math.max(0, Math.min(known.length - 1, start + step));
        const box = svg.getBoundingClientRect();
        const x = g.x(known[svg.place]);
        readCurves(figure, svg, x, box.left + (x / svg.viewBox.baseVal.width) * box.width, box.top + 40);
      });
    }
  }
  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (target) showTip([element("span", target.dataset.tip)], event.clientX, event.clientY);
    else if (!(event.target.closest && event.target.closest("svg.lines"))) hideTip();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });

  // ---- tables

  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const body = table.tBodies[0];
        const numeric = head.dataset.kind === "number";
        const before = head.getAttribute("aria-sort");
        const first = numeric ? "descending" : "ascending";
        const second = numeric ? "ascending" : "descending";
        const order = before === first ? second : first;
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => {
          const text = row.cells[column].dataset.v;
          return numeric ? (text === "" ? null : Number(text)) : text;
        };
        const rows = [...body.rows].map((row, index) => ({ row, index, value: value(row) }));
        rows.sort((a, b) => {
          // what has no number stays below, whichever way
          if (a.value === null || b.value === null) {
            return (a.value === null) - (b.value === null) || a.index - b.index;
          }
          const compared = numeric ? a.value - b.value : a.value.localeCompare(b.value);
          return sign * compared || a.index - b.index;
        });
        body.append(...rows.map((entry) => entry.row));
      });
    });
  }

  // ---- downloads

  const save = (text, type, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const quote = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const toCsv = ({ columns, rows }) =>
    [columns, ...rows].map((row) => row.map(quote).join(",")).join("\n") + "\n";
  const painted = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "opacity",
    "stroke-dasharray", "font-size", "font-weight", "font-family", "visibility"];
  // A picture of its own: computed colours of the light theme, a title and the names of the arms.
  const toSvg = (figure, svg) => {
    const theme = root.dataset.theme;
    root.dataset.theme = "light";
    const copy = svg.cloneNode(true);
    const own = all("*", svg);
    all("*", copy).forEach((node, i) => {
      const style = getComputedStyle(own[i]);
      for (const name of painted) node.setAttribute(name, style.getPropertyValue(name));
      if (style.display === "none") node.setAttribute("display", "none");
    });
    const legend = all(".legend li:has(button[data-toggle])").filter((item) => {
      const arm = item.querySelector("button").dataset.toggle;
      return svg.querySelector(`[data-arm="${arm}"]`) && !hidden.has(Number(arm));
    });
    const { width, height } = svg.viewBox.baseVal;
    const space = "http://www.w3.org/2000/svg";
    const add = (name, attributes, text = "") => {
      const node = document.createElementNS(space, name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      node.textContent = text;
      copy.append(node);
      return node;
    };
    const font = { "font-family": "sans-serif", "font-size": 13, fill: "#1a1f26" };
    let x = 12;
    let y = height + 16;
    for (const item of legend) {
      const button = item.querySelector("button");
      const label = button.dataset.label;
      const wide = 54 + 7.4 * label.length;
      if (x + wide > width) [x, y] = [12, y + 20];
      const picture = button.querySelector("svg").cloneNode(true);
      const drawn = all("*", button.querySelector("svg"));
      all("*", picture).forEach((node, i) => {
        for (const name of painted) node.setAttribute(name, getComputedStyle(drawn[i]).getPropertyValue(name));
      });
      for (const [key, value] of Object.entries({ x, y: y - 10, width: 26, height: 12 })) {
        picture.setAttribute(key, value);
      }
      copy.append(picture);
      add("text", { ...font, x: x + 32, y }, label);
      x += wide;
    }
    const keys = all(".key li", figure);
    for (const item of keys) {
      const wide = 40 + 7.4 * item.textContent.length;
      if (x + wide > width) [x, y] = [12, y + 20];
      const fill = getComputedStyle(item.querySelector("i")).backgroundColor;
      add("rect", { x, y: y - 10, width: 12, height: 12, fill });
      add("text", { ...font, x: x + 18, y }, item.textContent);
      x += wide;
    }
    const title = figure.querySelector("h3").textContent;
    add("text", { ...font, x: 12, y: -12, "font-size": 15, "font-weight": 600 }, title);
    const bottom = (legend.length + keys.length ? y + 12 : height + 6) + 36;
    const ground = add("rect", { x: 0, y: -36, width, height: bottom, fill: "#ffffff" });
    copy.prepend(ground);
    copy.setAttribute("xmlns", space);
    copy.setAttribute("viewBox", `0 -36 ${width} ${bottom}`);
    copy.setAttribute("width", width);
    copy.setAttribute("height", bottom);
    if (theme === undefined) root.removeAttribute("data-theme");
    else root.dataset.theme = theme;
    return new XMLSerializer().serializeToString(copy);
  };
  for (const figure of all("figure[data-name]")) {
    const name = figure.dataset.name;
    for (const button of all("button[data-get]", figure)) {
      button.addEventListener("click", () => {
        if (button.dataset.get === "csv") {
          save(toCsv(dataOf(figure)), "text/csv", `${name}.csv`);
          return;
        }
        const seen = all("svg.chart", figure).filter((svg) => svg.getClientRects().length > 0);
        if (seen.length) save(toSvg(figure, seen.length === 1 ? seen[0] : joined(seen)), "image/svg+xml", `${name}.svg`);
      });
    }
  }
  // Several small charts of one figure become one picture, side by side.
  const joined = (charts) => {
    const perLine = Math.min(3, charts.length);
    const holder = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const { width, height } = charts[0].viewBox.baseVal;
    charts.forEach((chart, i) => {
      const copy = chart.cloneNode(true);
      copy.setAttribute("x", (i % perLine) * width);
      copy.setAttribute("y", Math.floor(i / perLine) * (height + 22) + 22);
      copy.setAttribute("width", width);
      copy.setAttribute("height", height);
      const head = document.createElementNS("http://www.w3.org/2000/svg", "text");
      head.setAttribute("x", (i % perLine) * width + 12);
      head.setAttribute("y", Math.floor(i / perLine) * (height + 22) + 15);
      head.setAttribute("class", "head");
      head.textContent = chart.closest("[data-head]") ? chart.closest("[data-head]").dataset.head : "";
      holder.append(head, copy);
    });
    const lines = Math.ceil(charts.length / perLine);
    holder.setAttribute("viewBox", `0 0 ${width * perLine} ${lines * (height + 22)}`);
    holder.setAttribute("class", "chart joined");
    // computed styles need a place in the document
    charts[0].parentNode.append(holder);
    setTimeout(() => holder.remove(), 0);
    return holder;
  };
})();

"use strict";
(() => {
  // ---------------------------------------------------------------- dark and light
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
  const nameTheme = () => (theme.textContent = isDark() ? "Light colours" : "Dark colours");
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  systemIsDark.addEventListener("change", nameTheme);
  nameTheme();
  theme.hidden = false;

  // ---------------------------------------------------------------- what the tables say
  const valueOf = (cell) => {
    const text = cell.textContent;
    return text === "" ? NaN : isNaN(text) ? text : Number(text);
  };
  const rowsOf = (table) => {
    const keys = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.key);
    return [...table.tBodies[0].rows].map((row) => ({
      ...row.dataset,
      ...Object.fromEntries([...row.cells].map((cell, at) => [keys[at], valueOf(cell)])),
    }));
  };

  // ---------------------------------------------------------------- charts, each from its table
  const seriesColor = (row) => `var(--series-${row.series})`;
  const setColor = (row) => `var(--set-${row.series})`;
  const frame = (width, options, marks) =>
    Plot.plot({
      width,
      height: 300,
      marginTop: 28,
      marginLeft: 48,
      marginBottom: 38,
      marginRight: 14,
      color: { type: "identity" },
      style: { background: "transparent", fontSize: "12px", color: "var(--soft)" },
      ...options,
      marks,
    });
  const tipOf = (rows, x, y, title) =>
    Plot.tip(rows, Plot.pointer({ x, y, title, stroke: "var(--line)", fontSize: 12.5, textPadding: 10 }));

  /** Targets that lie so close that their lines and names would cover one another are a band. */
  const bandsOf = (targets, least) => {
    const bands = [];
    for (const target of d3.sort(targets)) {
      const last = bands.at(-1);
      if (last && target - last.high < least) last.high = target;
      else bands.push({ low: target, high: target });
    }
    return bands;
  };
  const nameOf = ({ low, high }) =>
    low === high ? `target ${high.toFixed(2)}` : `targets ${low.toFixed(2)} to ${high.toFixed(2)}`;

  const curves = (rows, { width, x, xLabel, y, yLabel, yZero, targets = [] }) => {
    const shown = rows.filter((row) => Number.isFinite(row[y]));
    const of = (kind) => shown.filter((row) => row.kind === kind);
    const dots = of("bold").length <= 12 * d3.group(shown, (row) => row.series).size ? of("bold") : [];
    const [lowest, highest] = d3.extent([...targets, ...shown.map((row) => row[y])]);
    const bands = bandsOf(targets, (highest - lowest) / 12);
    const [first, last] = d3.extent(shown, (row) => row[x]);
    const ticks = d3.ticks(x === "epoch" ? first : 0, last, Math.min(10, Math.floor(width / 60)));
    const xTicks = x === "epoch" ? { ticks: ticks.filter(Number.isInteger), tickFormat: "d" } : { ticks };
    const lines = { x, y, z: (row) => `${row.series} ${row.seed}`, stroke: seriesColor };
    return frame(
      width,
      {
        x: { label: xLabel, labelAnchor: "right", labelArrow: "none", zero: x === "seconds", nice: true, ...xTicks },
        y: { label: yLabel, labelArrow: "none", zero: yZero, nice: true, grid: true, ticks: 6, insetTop: 4 },
      },
      [
        Plot.rectY(bands, { y1: "low", y2: "high", fill: "var(--ink)", fillOpacity: 0.15 }),
        Plot.ruleY(bands, { y: "high", stroke: "var(--ink)", strokeWidth: 1.25, strokeDasharray: "6 4" }),
        Plot.text(bands, {
          y: "high", text: nameOf, frameAnchor: "left", lineAnchor: "bottom", dx: 4, dy: -4,
          fill: "var(--ink)", stroke: "var(--surface)", strokeWidth: 4,
        }),
        Plot.line(of("thin"), { ...lines, strokeWidth: 1, strokeOpacity: 0.5 }),
        Plot.line(of("running"), { ...lines, strokeWidth: 1.25, strokeDasharray: "2 3" }),
        Plot.line(of("bold"), { ...lines, strokeWidth: 2.5 }),
        Plot.dot(dots, { x, y, fill: seriesColor, r: 3 }),
        tipOf(shown, x, y, (row) =>
          [
            `${row.label}, ${row.seed === "mean" ? "mean of the seeds" : `seed ${row.seed}`}`,
            `${yLabel}: ${row[y]}`,
            `epoch ${row.epoch}, ${row.seconds} s`,
          ].join("\n")
        ),
      ]
    );
  };

  const bars = (rows, { width }) => {
    const phases = Object.keys(rows[0]).filter((key) => !["series", "label", "whole"].includes(key));
    const parts = rows.flatMap((row) => phases.map((phase) => ({ ...row, phase, seconds: row[phase] })));
    const names = rows.map((row) => String(row.label));
    return frame(
      width,
      {
        height: 56 + 44 * rows.length,
        marginTop: 8,
        marginLeft: Math.min(width / 3, 24 + 7 * d3.max(names, (name) => name.length)),
        marginRight: 64,
        x: { label: "seconds", labelArrow: "none", nice: true, ticks: width / 110, grid: true },
        y: { label: null, domain: names, padding: 0.35, tickSize: 0 },
      },
      [
        Plot.axisY({ tickSize: 0, label: null, lineWidth: 16, textOverflow: "ellipsis", fontSize: 13, fill: "var(--ink)" }),
        Plot.barX(parts, {
          x: "seconds", y: "label", fill: (part) => `var(--phase-${phases.indexOf(part.phase)})`, order: phases, insetRight: 1,
        }),
        Plot.text(rows, {
          x: (row) => d3.sum(phases, (phase) => row[phase]), y: "label", text: (row) => `${row.whole.toPrecision(3)} s`,
          dx: 8, textAnchor: "start", fill: "var(--ink)", fontSize: 13,
        }),
        tipOf(rows, (row) => row.whole, "label", (row) =>
          [row.label, ...phases.map((phase) => `${phase}: ${row[phase]} s`)].join("\n")
        ),
      ]
    );
  };

  const widths = (rows, { width }) => {
    const first = rows.filter((row) => row.series === rows[0].series && row.seed === rows[0].seed);
    const cycles = first.map((row, at) => ({ ...row, from: at ? first[at - 1].step : 0 })).filter((row) => row.removes === "yes");
    return frame(
      width,
      {
        x: { label: "training steps", labelAnchor: "right", labelArrow: "none", nice: true, zero: true, ticks: width / 110 },
        y: { label: "units", labelArrow: "none", zero: true, nice: true, grid: true, ticks: 6 },
      },
      [
        Plot.rectX(cycles, { x1: "from", x2: "step", fill: "var(--soft)", fillOpacity: 0.12 }),
        Plot.line(rows, {
          x: "step", y: "width", z: (row) => `${row.series} ${row.seed}`, stroke: setColor, strokeWidth: 1.75, curve: "step-after",
        }),
        tipOf(rows, "step", "width", (row) => `${row.label}, seed ${row.seed}\n${row.width} units after ${row.step} steps`),
      ]
    );
  };

  const activity = (rows, { width, yLabel }) =>
    frame(
      width,
      {
        x: { label: "units, the most active first, %", labelAnchor: "right", labelArrow: "none", domain: [0, 100], ticks: width / 110 },
        y: { label: yLabel, labelArrow: "none", zero: true, nice: true, grid: true, ticks: 6 },
      },
      [
        Plot.line(rows, { x: "place", y: "share", z: (row) => `${row.series} ${row.seed}`, stroke: setColor, strokeWidth: 1.75 }),
        tipOf(rows, "place", "share", (row) => `${row.label}, seed ${row.seed}\n${row.share}% of the examples`),
      ]
    );

  const SECONDS = { x: "seconds", xLabel: "seconds of training steps" };
  const kinds = {
    seconds: (rows, options) => curves(rows, { ...options, ...SECONDS, y: "score" }),
    epoch: (rows, options) => curves(rows, { ...options, x: "epoch", xLabel: "epochs", y: "score" }),
    density: (rows, options) => curves(rows, { ...options, ...SECONDS, y: "density", yZero: true }),
    parts: bars,
    widths,
    activity,
  };
  const draw = (place, rows, targets) => {
    const width = Math.floor(place.clientWidth);
    if (!width || place.dataset.width === String(width)) return;
    place.dataset.width = width;
    const picture = kinds[place.dataset.chart](rows, { width, yLabel: place.dataset.y, targets });
    for (const mark of picture.querySelectorAll("[aria-label]")) {
      mark.dataset.mark = mark.getAttribute("aria-label"); // the picture has one label, and elements without a role none
      mark.removeAttribute("aria-label");
    }
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", place.dataset.label);
    place.replaceChildren(picture);
  };
  for (const charts of document.querySelectorAll("[data-table]")) {
    const rows = rowsOf(document.getElementById(`${charts.dataset.table}-table`));
    const targets = JSON.parse(charts.dataset.targets || "[]");
    for (const place of charts.querySelectorAll("[data-chart]")) {
      draw(place, rows, targets);
      new ResizeObserver(() => draw(place, rows, targets)).observe(place);
    }
  }

  // ---------------------------------------------------------------- sorting
  const compare = (first, second) =>
    typeof first === "number" && typeof second === "number" ? first - second : String(first).localeCompare(String(second));
  const keyOf = (row, at) => {
    const text = row.cells[at].textContent.trim();
    const number = parseFloat(text);
    return isNaN(number) ? text : number;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        heads.forEach((each) => each.setAttribute("aria-sort", each === head ? direction : "none"));
        const sign = direction === "ascending" ? 1 : -1;
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => sign * compare(keyOf(a, at), keyOf(b, at))));
      });
    });
  }

  // ---------------------------------------------------------------- copying and downloading
  const said = document.getElementById("said");
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", () =>
      navigator.clipboard.writeText(button.dataset.copy).then(
        () => (said.textContent = "The command is copied."),
        () => (said.textContent = "The browser does not allow copying: select the command instead.")
      )
    );
  }
  for (const button of document.querySelectorAll("[data-download]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = document.getElementById(`result-${button.dataset.download}`).textContent;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = button.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href));
      said.textContent = `${button.dataset.name} is downloaded.`;
    });
  }
})();

// Where the pointer is over a figure, the line below the figure says the numbers. They are read from the figure's own
// tables, so that nothing is written twice; a heat map has its cells as JSON, the upper half of float32 for each.
"use strict";
const SVG = "http://www.w3.org/2000/svg";

function readCells(figure) {
  const source = figure.querySelector("script.cells");
  if (!source) return null;
  const cells = JSON.parse(source.textContent);
  const bytes = Uint8Array.from(atob(cells.values), (character) => character.charCodeAt(0));
  const halves = new DataView(bytes.buffer), one = new DataView(new ArrayBuffer(4));
  cells.at = (index) => (one.setUint16(0, halves.getUint16(2 * index, true)), one.getFloat32(0));
  return cells;
}

function readTable(table) {
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = [...table.tBodies[0].rows];
  const number = (row) => Number(row.dataset.x ?? row.cells[0].textContent.replaceAll(",", ""));
  const positions = rows.map(number);
  return { name: table.dataset.name, names, rows, positions };
}

function nearest(positions, x) {
  let best = 0;
  for (let i = 1; i < positions.length; i++) if (Math.abs(positions[i] - x) < Math.abs(positions[best] - x)) best = i;
  return best;
}

function sayCell(cells, panel, x, share) {
  const [first, last] = panel.cells;
  const row = Math.min(last - 1, first + Math.floor(share * (last - first)));
  const column = Math.min(cells.steps.length - 1, Math.max(0, Math.floor(x)));
  const value = cells.at(row * cells.steps.length + column);
  const text = Number.isNaN(value) ? "not measured" : Number((value * cells.scale).toPrecision(2)) + cells.suffix;
  return `${cells.rows[row]} · step ${cells.steps[column].toLocaleString("en")} · ${text}`;
}

function sayRow(table, x) {
  const row = table.rows[nearest(table.positions, x)];
  const parts = [...row.cells].map((cell, place) => `${table.names[place]} ${cell.textContent}`);
  return [table.name, ...parts].filter(Boolean).join(" · ");
}

function listen(figure) {
  const output = figure.querySelector("output");
  let cells, tables;
  for (const drawing of figure.querySelectorAll(".drawing")) {
    const panels = JSON.parse(drawing.dataset.panels), svg = drawing.querySelector("svg");
    if (!panels.length) continue;
    figure.classList.add("readable");
    const hair = svg.appendChild(document.createElementNS(SVG, "path"));
    hair.setAttribute("class", "hair");
    const leave = () => { output.textContent = ""; hair.removeAttribute("d"); };
    const move = (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const left = (event.clientX - box.left) * scale, top = (event.clientY - box.top) * scale;
      const panel = panels.find((p) => left >= p.left && left <= p.right && top >= p.top && top <= p.bottom);
      if (!panel) return leave();
      cells ??= readCells(figure);
      tables ??= [...figure.querySelectorAll("table")].map(readTable);
      const x = panel.low + ((left - panel.left) / (panel.right - panel.left)) * (panel.high - panel.low);
      const share = (top - panel.top) / (panel.bottom - panel.top);
      output.textContent = panel.cells ? sayCell(cells, panel, x, share) : sayRow(tables[panel.table], x);
      hair.setAttribute("d", `M${left} ${panel.top}V${panel.bottom}`);
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
  }
}

document.querySelectorAll("figure").forEach(listen);

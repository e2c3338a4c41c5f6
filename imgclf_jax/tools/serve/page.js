"use strict";
const by = (id) => document.getElementById(id);
let newest = 0; // of several images in a row only the last one's answer is shown
let shown = null, explains = false;

async function classify(image) {
  const number = ++newest;
  by("status").className = "";
  by("status").textContent = "Classifying …";
  const begun = performance.now();
  let answer, error = "";
  try {
    const response = await fetch("predict", { method: "POST", body: image });
    answer = await response.json();
    if (!response.ok) error = answer.error || `the server answers ${response.status}`;
  } catch (e) {
    error = "the server does not answer";
  }
  if (number !== newest) return;
  const took = performance.now() - begun;
  // A regression gives numbers by name, and several labels may be none.
  const numbers = !error && answer.values;
  const found = error ? [] : numbers ? Object.entries(numbers).map(([name, value]) => ({ class: name, value })) : answer.predictions;
  show(image, found, Boolean(error));
  by("status").scrollIntoView({ block: "nearest" }); // on a phone it is below the image that was given
  by("status").className = error ? "error" : "";
  by("status").textContent = error ||
    `${numbers ? `${found[0].class} ${found[0].value.toPrecision(5)}` : found.length ? found[0].class : "no label"}, in ${took.toFixed(0)} ms (${answer.milliseconds.toFixed(1)} ms in the server)`;
}

function show(image, predictions, failed) {
  const preview = by("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.hidden = failed;
  shown = image;
  by("explanation").hidden = true;
  by("explain").hidden = !(explains && predictions.length);
  by("classes").hidden = !predictions.length;
  by("classes").tBodies[0].replaceChildren(...predictions.map((p) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = p.class;
    const value = document.createElement("td");
    value.className = "number";
    row.append(name, value);
    if ("value" in p) {
      value.textContent = p.value.toPrecision(5);
      return row;
    }
    value.textContent = p.probability.toFixed(4);
    const bar = document.createElement("meter");
    bar.value = p.probability;
    bar.setAttribute("aria-label", `probability of ${p.class}`);
    const last = document.createElement("td");
    last.append(bar);
    row.append(last);
    return row;
  }));
}

by("explain").addEventListener("click", async () => {
  const number = newest, explanation = by("explanation");
  by("explain").disabled = true;
  try {
    const response = await fetch("explain", { method: "POST", body: shown });
    if (response.ok && number === newest) {
      URL.revokeObjectURL(explanation.src);
      explanation.src = URL.createObjectURL(await response.blob());
      explanation.hidden = false;
      by("explain").hidden = true;
    } else if (!response.ok) {
      by("status").className = "error";
      by("status").textContent = (await response.json()).error;
    }
  } finally {
    by("explain").disabled = false;
  }
});

const firstImage = (files) => Array.from(files).find((file) => file.type.startsWith("image/")) || files[0];

for (const [button, input] of [["choose", "file"], ["photograph", "camera"]]) {
  by(button).addEventListener("click", () => by(input).click());
  by(input).addEventListener("change", () => {
    if (by(input).files.length) classify(by(input).files[0]);
    by(input).value = ""; // the same file may be chosen again
  });
}

document.addEventListener("dragover", (event) => { event.preventDefault(); by("drop").classList.add("over"); });
document.addEventListener("dragleave", () => by("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  if (event.dataTransfer.files.length) classify(firstImage(event.dataTransfer.files));
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) classify(firstImage(event.clipboardData.files));
});

const canvas = by("canvas"), pen = canvas.getContext("2d");
let last = null;
function clear() {
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = place(event); stroke(event); });
canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
function stroke(event) {
  const next = place(event);
  pen.strokeStyle = "#fff";
  pen.lineWidth = canvas.width / 14;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(next[0] + 0.01, next[1]);
  pen.stroke();
  last = next;
}
by("clear").addEventListener("click", clear);
by("classify").addEventListener("click", () => canvas.toBlob((image) => classify(image)));
clear();

by("command").textContent = `curl --data-binary @image.jpg '${location.origin}/predict?top_k=3'`;
fetch("health").then((response) => response.json()).then((found) => {
  explains = found.explains;
  const what = { regression: "values", multilabel: "labels" }[found.task] || "classes";
  by("result").textContent = `Its ${what}`;
  const [first, second] = by("classes").tHead.rows[0].cells;
  first.textContent = { values: "target", labels: "label" }[what] || "class";
  second.textContent = what === "values" ? "value" : "probability";
  by("model").textContent = `${found.model}, step ${found.step}, ${found.classes.length} ${what}: ` +
    found.classes.slice(0, 12).join(", ") + (found.classes.length > 12 ? ", …" : "");
});

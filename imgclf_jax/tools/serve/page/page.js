"use strict";
const by = (id) => document.getElementById(id);
let model = { classes: [] };

// The response to an image, or an Error that says why there is none.
async function post(route, field, file) {
  const form = new FormData();
  form.append(field, file, file.name || "image.png");
  const response = await fetch(route, { method: "POST", body: form }).catch(() => {
    throw new Error("the server does not answer");
  });
  if (response.ok) return response;
  const { detail } = await response.json().catch(() => ({}));
  throw new Error(typeof detail === "string" ? detail : `the server answers ${response.status}`);
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function classify(files) {
  const begun = performance.now();
  by("status").textContent = "Classifying …";
  by("answers").querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  by("answers").replaceChildren(...files.map(() => element("article")));
  await Promise.all(files.map(async (file, place) => {
    const article = by("answers").children[place];
    try {
      const [answer] = await (await post("predict", "images", file)).json();
      show(article, file, answer.predictions);
    } catch (error) {
      const name = file.name || "the image", said = error.message.startsWith(name) ? "" : `${name}: `;
      article.append(element("p", { className: "error", textContent: said + error.message }));
    }
  }));
  const took = performance.now() - begun, failed = by("answers").querySelectorAll(".error").length;
  by("status").textContent = `${files.length} ${files.length > 1 ? "images" : "image"} in ${took.toFixed(0)} ms` +
    (failed ? `, ${failed} failed` : "");
  by("status").scrollIntoView({ block: "nearest" }); // on a phone the answers are below the images
}

function show(article, file, predictions) {
  const rows = predictions.map((p) => element("tr", {},
    element("th", { scope: "row", textContent: p.class }),
    element("td", { className: "number", textContent: decimals(p.probability) }),
    element("td", {}, element("meter", { value: p.probability, ariaLabel: `probability of ${p.class}` }))));
  const name = file.name || "the image", explain = element("button", { type: "button", textContent: "Show where" });
  explain.addEventListener("click", () => {
    const first = predictions.map((p) => p.class), others = model.classes.filter((other) => !first.includes(other));
    const options = [...first, ...others].map((each) => element("option", { value: each, textContent: each }));
    const choice = element("select", {}, ...options), heatmap = element("img", { className: "heatmap" });
    const draw = async () => {
      heatmap.alt = `Where ${name} speaks for ${choice.value}`;
      try {
        const response = await post(`explain?class=${encodeURIComponent(choice.value)}`, "image", file);
        heatmap.src = URL.createObjectURL(await response.blob());
      } catch (error) {
        by("status").textContent = error.message;
      }
    };
    choice.addEventListener("change", draw);
    explain.replaceWith(element("label", {}, "Evidence for ", choice), heatmap);
    draw();
  });
  article.append(
    element("img", { src: URL.createObjectURL(file), alt: name }),
    element("div", {}, element("table", {}, element("caption", { textContent: name }), element("tbody", {}, ...rows)),
      ...(rows.length ? [explain] : ["no label"])));
}

// Never 1.0000 for less than 1, nor 0.0000 for more than 0.
function decimals(p) {
  const text = p.toFixed(4);
  return text === "1.0000" && p < 1 ? ">0.9999" : text === "0.0000" && p > 0 ? "<0.0001" : text;
}

function take(files) {
  if (files.length) classify(Array.from(files));
}
by("choose").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", () => {
  take(by("file").files);
  by("file").value = ""; // the same file may be chosen again
});
document.addEventListener("dragover", (event) => { event.preventDefault(); by("drop").classList.add("over"); });
document.addEventListener("dragleave", () => by("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));

const canvas = by("canvas"), pen = canvas.getContext("2d");
let last = null, drawn = false;
function clear() {
  drawn = false;
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}
function stroke(event) {
  const box = canvas.getBoundingClientRect();
  const next = [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  pen.strokeStyle = "#fff";
  pen.lineWidth = canvas.width / 14;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...(last || next));
  pen.lineTo(next[0] + 0.01, next[1]);
  pen.stroke();
  last = next;
  drawn = true;
}
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); stroke(event); });
canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
by("clear").addEventListener("click", clear);
by("classify").addEventListener("click", () => {
  if (drawn) canvas.toBlob((image) => classify([image]));
  else by("status").textContent = "The drawing is empty: draw something first.";
});
clear();

by("command").textContent = `curl -F images=@a.jpg -F images=@b.jpg '${location.origin}/predict?top_k=3'`;
fetch("model").then((response) => response.json()).then((found) => {
  model = found;
  const what = found.task === "multilabel" ? "labels" : "classes", { height, width, channels } = found.input;
  document.title = by("name").textContent = found.name || found.model;
  by("result").textContent = what[0].toUpperCase() + what.slice(1);
  by("drawing").hidden = channels !== 1 || height !== width || width > 64; // where images may be drawn
  by("model").textContent = `${found.model}, step ${found.step}, ${found.classes.length} ${what}: ` +
    found.classes.slice(0, 12).join(", ") + (found.classes.length > 12 ? ", …" : "");
});

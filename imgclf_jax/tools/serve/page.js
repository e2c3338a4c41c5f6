"use strict";
const by = (id) => document.getElementById(id);
const AT_ONCE = 4; // requests
let model = { classes: [], explains: false, task: "classes" };
let items = [], current = 0; // the images of the last drop: { file, url, answer, error, explanations }
let newest = 0; // the number of the last drop; answers to earlier ones are not shown

async function post(route, image) {
  try {
    const response = await fetch(route, { method: "POST", body: image });
    const answer = await response.json();
    return response.ok ? { answer } : { error: answer.error || `the server answers ${response.status}` };
  } catch (e) {
    return { error: "the server does not answer" };
  }
}

async function classify(files) {
  const number = ++newest, begun = performance.now();
  for (const item of items) URL.revokeObjectURL(item.url);
  const mine = items = files.map((file) => ({ file, url: URL.createObjectURL(file), explanations: {} }));
  current = 0;
  let done = 0, next = 0;
  const say = () => tell(mine.length > 1 ? `Classifying ${done} of ${mine.length} …` : "Classifying …");
  say();
  const work = async () => {
    while (next < mine.length && number === newest) {
      const item = mine[next++];
      Object.assign(item, await post("predict", item.file));
      done++;
      if (number === newest && mine.length > 1) say();
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (number !== newest) return;
  const took = performance.now() - begun;
  drawStrip();
  select(Math.max(0, mine.findIndex((item) => item.answer)));
  const failed = mine.filter((item) => item.error);
  if (mine.length > 1) {
    tell(`${mine.length - failed.length} images in ${took.toFixed(0)} ms` +
      (failed.length ? `; ${failed.length} cannot be classified: ${failed[0].file.name || "image"}: ${failed[0].error}` : ""), failed.length);
  } else {
    const { answer, error } = mine[0];
    tell(error || `${headline(answer)}, in ${took.toFixed(0)} ms (${answer.milliseconds.toFixed(1)} ms in the server)`, error);
  }
  // On a phone the answer is below what was given, and a long list of thumbnails is above it.
  (innerWidth < 700 ? by("results") : by("status")).scrollIntoView({ block: innerWidth < 700 ? "start" : "nearest" });
}

function tell(text, failed) {
  by("status").className = failed ? "error" : "";
  by("status").textContent = text;
}

// Never 1.0000 for less than 1, nor 0.0000 for more than 0.
function decimals(p) {
  const text = p.toFixed(4);
  return text === "1.0000" && p < 1 ? ">0.9999" : text === "0.0000" && p > 0 ? "<0.0001" : text;
}

function headline(answer) { // several labels may be none
  const [first] = answer.predictions;
  return first ? first.class : "no label";
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawStrip() {
  by("strip").hidden = items.length < 2;
  by("strip").replaceChildren(...items.map((item, place) => {
    const label = item.error ? "not an image" : headline(item.answer);
    const button = element("button", { type: "button", className: item.error ? "thumbnail error" : "thumbnail" },
      element("img", { src: item.error ? "data:," : item.url, alt: "" }), element("span", { textContent: label }));
    button.disabled = Boolean(item.error);
    button.title = item.error || item.file.name || "";
    button.addEventListener("click", () => select(place));
    return button;
  }));
}

function select(place) {
  current = place;
  const { answer, url } = items[place];
  [...by("strip").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === place)));
  by("one").hidden = !answer;
  by("where").hidden = by("heat").hidden = true;
  by("preview").src = url;
  const found = answer ? answer.predictions : [];
  by("explain").hidden = !(model.explains && found.length);
  by("numbers").hidden = !found.length;
  by("classes").tBodies[0].replaceChildren(...found.map((p) => {
    const value = element("td", { className: "number", textContent: decimals(p.probability) });
    const row = element("tr", {}, element("th", { scope: "row", textContent: p.class }), value);
    const bar = element("meter", { value: p.probability });
    bar.setAttribute("aria-label", `probability of ${p.class}`);
    row.append(element("td", {}, bar));
    return row;
  }));
  const first = found.map((p) => p.class), others = model.classes.filter((name) => !first.includes(name));
  by("wanted").replaceChildren(...[...first, ...others].map((name) => element("option", { value: name, textContent: name })));
}

async function explain() {
  const item = items[current], number = newest, place = current, wanted = by("wanted").value;
  by("explain").disabled = by("wanted").disabled = true;
  const found = item.explanations[wanted] || await post(`explain?format=json&class=${encodeURIComponent(wanted)}`, item.file);
  by("explain").disabled = by("wanted").disabled = false;
  if (number !== newest || place !== current) return;
  if (found.error) {
    tell(found.error, true);
    return;
  }
  item.explanations[wanted] = found;
  const { image, heatmap, lowest, highest, method } = found.answer;
  by("preview").src = image; // as the model gets it, so that the heatmap fits
  by("heat").src = heatmap;
  by("heat").alt = `where the image speaks for ${wanted}`;
  by("where").hidden = by("heat").hidden = false;
  by("explain").hidden = true;
  by("lowest").textContent = lowest.toPrecision(3);
  by("highest").textContent = highest.toPrecision(3);
  by("method").textContent = `The image as the model gets it, by ${{ gradcam: "Grad-CAM", rollout: "attention rollout", occlusion: "occlusion" }[method]}.`;
}

by("explain").addEventListener("click", explain);
by("wanted").addEventListener("change", explain);
by("preview").addEventListener("load", () => { // each pixel of a small image is shown
  const { naturalWidth: w, naturalHeight: h } = by("preview");
  by("preview").classList.toggle("small", Math.max(w, h) <= 64);
});
const fade = () => { by("heat").style.opacity = by("opacity").value / 100; };
by("opacity").addEventListener("input", fade);
fade();

function take(files) {
  const all = Array.from(files), images = all.filter((file) => file.type.startsWith("image/"));
  if (all.length) classify(images.length ? images : all);
}
for (const [button, input] of [["choose", "file"], ["photograph", "camera"]]) {
  by(button).addEventListener("click", () => by(input).click());
  by(input).addEventListener("change", () => {
    take(by(input).files);
    by(input).value = ""; // the same file may be chosen again
  });
}
document.addEventListener("dragover", (event) => { event.preventDefault(); by("drop").classList.add("over"); });
document.addEventListener("dragleave", () => by("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));

// A phone's own camera takes the photograph; a desktop's is shown here. Browsers let pages of this machine, or over TLS.
const touch = matchMedia("(pointer: coarse)").matches;
by("photograph").hidden = !touch;
by("webcam").hidden = touch || !(navigator.mediaDevices && navigator.mediaDevices.getUserMedia);
let camera = null;
by("webcam").addEventListener("click", async () => {
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: true });
  } catch (e) {
    tell(e.name === "NotAllowedError" ? "the browser does not let this page use the camera" : "there is no camera", true);
    return;
  }
  by("video").srcObject = camera;
  by("viewfinder").hidden = false;
  by("webcam").hidden = true;
});
by("shoot").addEventListener("click", () => {
  const video = by("video");
  if (!video.videoWidth) return;
  const frame = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  frame.getContext("2d").drawImage(video, 0, 0);
  frame.toBlob((image) => classify([image]), "image/jpeg", 0.95);
});
by("stop").addEventListener("click", () => {
  for (const track of camera.getTracks()) track.stop();
  by("video").srcObject = null;
  by("viewfinder").hidden = true;
  by("webcam").hidden = false;
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
by("classify").addEventListener("click", () => canvas.toBlob((image) => classify([image])));
clear();

by("command").textContent = `curl --data-binary @image.jpg '${location.origin}/predict?top_k=3'\n` +
  `curl -F images=@a.jpg -F images=@b.jpg '${location.origin}/predict?top_k=3'`;
fetch("model").then((response) => response.json()).then((found) => {
  model = found;
  const what = found.task === "multilabel" ? "labels" : "classes";
  by("result").textContent = what[0].toUpperCase() + what.slice(1);
  by("classes").tHead.rows[0].cells[0].textContent = what === "labels" ? "label" : "class";
  const { height, width, channels } = found.input;
  by("drawing").hidden = channels !== 1 || height !== width || width > 64; // where images may be drawn
  by("model").textContent = `${found.model}, step ${found.step}, ${found.classes.length} ${what}: ` +
    found.classes.slice(0, 12).join(", ") + (found.classes.length > 12 ? ", …" : "");
});

// The vote page. The server says what to show (see Survey.state). An answer is a list of numbers, one for each image in
// the order shown. The server replies with the next question once the answer is stored.
"use strict";

const $ = (id) => document.getElementById(id);
const page = document.body.dataset; // mode, ties, questions, hint; state: loading, ready, saving or done

let screen = null; // task, prompt, question, title, text, advice, number, images
let last = null; // the task and question of the answer that Undo deletes
let marks = []; // ranks or points by place, 0 for none yet (modes rank and points)
let preloaded = [];

// ---- modes: possible answers and their keys

const PAIR = [
  { label: "Image 1", keys: ["ArrowLeft", "1"], key: "←", answer: [1, 0] },
  { label: "Both alike", keys: [" ", "0"], key: "space", answer: [0.5, 0.5], isTie: true },
  { label: "Image 2", keys: ["ArrowRight", "2"], key: "→", answer: [0, 1] },
];
const CHOICES = {
  pairs: page.ties ? PAIR : PAIR.filter((choice) => !choice.isTie),
  tag: [
    { label: "No", keys: ["ArrowLeft", "n", "1"], key: "←", answer: [0] },
    { label: "Yes", keys: ["ArrowRight", "y", "2"], key: "→", answer: [1] },
  ],
};
const choices = CHOICES[page.mode];
const KEYS = {
  pairs: [["←", "or", "1"], "image 1", ["→", "or", "2"], "image 2", ...(page.ties ? [["space"], "both alike"] : []), ["Backspace"], "undo", ["Z"], "enlarge"],
  tag: [["←", "or", "N"], "no", ["→", "or", "Y"], "yes", ["Backspace"], "undo", ["Z"], "enlarge"],
  rank: [["1", "to", "last"], "choose an image", ["Enter"], "save", ["Backspace"], "undo", ["Z"], "enlarge"],
  points: [["1", "to", "5"], "points for the framed image", ["Enter"], "save", ["Backspace"], "undo", ["Z"], "enlarge"],
};

function rank(place) {
  if (marks[place]) {
    const removed = marks[place];
    marks = marks.map((mark) => (mark === removed ? 0 : mark > removed ? mark - 1 : mark));
  } else {
    marks[place] = Math.max(...marks) + 1;
    if (Math.max(...marks) === marks.length - 1) marks[marks.indexOf(0)] = marks.length; // the last image is left
  }
  drawMarks();
}

function give(place, points) {
  marks[place] = points;
  drawMarks();
}

const isComplete = () => marks.length > 0 && marks.every((mark) => mark > 0);

function unmark() {
  if (page.mode === "rank") rank(marks.indexOf(Math.max(...marks)));
  else give(marks.findLastIndex((mark) => mark > 0), 0);
}

// ---- what is drawn

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(state) {
  screen = state.now;
  last = state.last;
  $("bar").max = Math.max(state.total, 1);
  $("bar").value = state.answered;
  $("count").textContent = `${state.answered} of ${state.total} answered`;
  $("undo").disabled = !last;
  $("images").replaceChildren();
  $("answers").replaceChildren();
  marks = [];
  preloaded = state.next_images.map((id) => Object.assign(new Image(), { src: `/image/${id}` }));
  if (screen) ask();
  else thank();
}

function thank() {
  page.state = "done";
  for (const id of ["kind", "advice", "prompt", "hint", "keys"]) $(id).textContent = "";
  page.number = "";
  $("question").textContent = "That was all. Thank you!";
  $("after").hidden = false;
}

// Shows keys and what they do: a list of names of keys, then a word, and so on.
function drawKeys() {
  const name = (key) => (key === "last" ? Math.min(screen.images.length, 9) : key);
  const draw = (key) => (key === "or" || key === "to" ? ` ${key} ` : element("kbd", { textContent: name(key) }));
  const shown = (part) => (Array.isArray(part) ? part.map(draw) : [` ${part}`, element("span", { className: "gap" })]);
  $("keys").replaceChildren("Keys: ", ...KEYS[page.mode].flatMap(shown));
}

async function ask() {
  page.state = "loading";
  page.number = screen.number;
  $("after").hidden = true;
  const several = Number(page.questions) > 1;
  $("kind").textContent = [several && `Question ${screen.number} of ${page.questions}`, screen.title].filter(Boolean).join(": ");
  $("question").textContent = screen.text;
  $("advice").textContent = screen.advice;
  $("prompt").textContent = screen.prompt || "The prompt is hidden for this question.";
  $("prompt").classList.toggle("hidden-prompt", !screen.prompt);
  $("hint").textContent = page.hint;
  drawKeys();
  const images = screen.images.map((id, place) =>
    element("img", { src: `/image/${id}`, alt: `Image ${place + 1}`, draggable: false }));
  $("images").dataset.count = images.length;
  $("images").replaceChildren(...images.map(figure));
  if (choices) $("answers").replaceChildren(...choices.map(choiceButton));
  else {
    marks = images.map(() => 0);
    $("answers").replaceChildren(element("button", { id: "save", className: "primary", textContent: "Save", onclick: () => send(marks) }));
    drawMarks();
  }
  const shown = screen;
  try {
    await Promise.all(images.map((image) => image.decode()));
    if (screen === shown) page.state = "ready";
  } catch {
    if (screen === shown) say("An image cannot be shown. Reload the page. If that does not help, tell the person who sent you here.");
  }
}

function figure(image, place) {
  image.onclick = (event) => clickImage(event, place);
  const made = element("figure", {}, image);
  if (screen.images.length > 1) made.append(element("span", { className: "number", textContent: place + 1 }));
  if (page.mode === "rank") made.append(element("span", { className: "mark" }));
  made.append(element("button", { className: "enlarge", textContent: "Enlarge", title: "Enlarge (Z)", onclick: () => zoom(place) }));
  if (page.mode === "points") {
    const buttons = [1, 2, 3, 4, 5].map((points) =>
      element("button", { textContent: points, title: `${points} of 5`, onclick: () => page.state === "ready" && give(place, points) }));
    made.append(element("div", { className: "points" }, ...buttons));
  }
  return made;
}

// Chooses the image. With points and faults a click says nothing, so it enlarges.
function clickImage(event, place) {
  if (page.mode === "pairs") choose(choices.find((choice) => choice.answer[place] === 1), event);
  else if (page.mode === "rank") page.state === "ready" && rank(place);
  else zoom(place);
}

// The second click of a double click would answer the next question unseen.
function choose(choice, event) {
  if (event.detail < 2) send(choice.answer);
}

function choiceButton(choice) {
  const key = element("kbd", { textContent: choice.key });
  return element("button", { className: choice.isTie ? "" : "primary", onclick: (event) => choose(choice, event) }, `${choice.label} `, key);
}

function drawMarks() {
  const current = marks.indexOf(0);
  [...$("images").children].forEach((made, place) => {
    made.classList.toggle("marked", marks[place] > 0);
    made.classList.toggle("current", page.mode === "points" && place === current);
    if (page.mode === "rank") made.querySelector(".mark").textContent = marks[place] || "";
    made.querySelectorAll(".points button").forEach((button, k) => button.classList.toggle("primary", k + 1 === marks[place]));
  });
  $("save").disabled = !isComplete();
}

// ---- the larger image

let zoomed = 0;

function zoom(place) {
  if (!screen) return;
  zoomed = (place + screen.images.length) % screen.images.length;
  $("large").src = `/image/${screen.images[zoomed]}`;
  $("large").alt = $("which").textContent = screen.images.length > 1 ? `Image ${zoomed + 1}` : "";
  $("other").hidden = screen.images.length < 2;
  if (!$("zoom").open) {
    $("zoom").classList.remove("actual");
    $("zoom").showModal();
  }
}

$("large").onclick = () => $("zoom").classList.toggle("actual");
$("other").onclick = () => zoom(zoomed + 1);
$("close").onclick = () => $("zoom").close();
$("zoom").onclick = (event) => event.target.tagName !== "IMG" && event.target.tagName !== "BUTTON" && $("zoom").close();

// ---- the server

const say = (text) => ($("message").textContent = text);
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// Repeats a request until the server replies; the server counts a repeated vote or undo once.
async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    const response = await fetch(path, options).catch(() => null);
    if (response && response.status < 500) return response;
    say("Not stored yet: the server does not answer. Trying again ...");
    await pause(wait);
  }
}

async function request(path, body) {
  page.state = "saving";
  let response = await call(path, body);
  say("");
  if (!response.ok) {
    say(await response.text());
    response = await call("/api/state");
  }
  if (response.ok) show(await response.json());
}

function send(answer) {
  if (page.state !== "ready") return;
  if (page.mode === "pairs") [...$("images").children].forEach((made, place) => made.classList.toggle("marked", answer[place] === 1));
  request("/api/vote", { task: screen.task, question: screen.question, answer });
}

function undo() {
  if (last && (page.state === "ready" || page.state === "done")) request("/api/undo", last);
}

// ---- keys

function press(event) {
  const onControl = event.target.closest("button") && (event.key === " " || event.key === "Enter");
  if ($("me").open || event.repeat || event.ctrlKey || event.metaKey || event.altKey || onControl) return;
  if ($("zoom").open) {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") zoom(zoomed + (event.key === "ArrowLeft" ? -1 : 1));
    else if (event.key.toLowerCase() === "z") $("zoom").close();
    return;
  }
  if (event.key === " " || event.key === "Backspace") event.preventDefault();
  if (event.key === "Backspace") marks.some((mark) => mark > 0) ? unmark() : undo();
  else if (page.state !== "ready") return;
  else if (event.key.toLowerCase() === "z") zoom(0);
  else if (choices) choices.filter((choice) => choice.keys.includes(event.key.length > 1 ? event.key : event.key.toLowerCase())).forEach((choice) => send(choice.answer));
  else if (event.key === "Enter" && isComplete()) send(marks);
  else if (page.mode === "rank" && event.key >= "1" && event.key <= String(Math.min(marks.length, 9))) rank(Number(event.key) - 1);
  else if (page.mode === "points" && event.key >= "1" && event.key <= "5" && marks.includes(0)) give(marks.indexOf(0), Number(event.key));
}

document.addEventListener("keydown", press);
$("undo").onclick = undo;
$("link").value = new URL($("link").value, location.origin).href;
$("link").onfocus = () => $("link").select();
$("leave").onclick = () => $("me").showModal();
$("stay").onclick = () => $("me").close();
$("forget").onclick = async () => {
  await call("/api/leave", {});
  location.assign("/");
};
request("/api/state");

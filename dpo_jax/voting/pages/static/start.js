// The start page: tells the server who votes, then opens the page to vote on.
"use strict";

document.getElementById("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = document.getElementById("message");
  try {
    const response = await fetch("/api/start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: document.getElementById("name").value }),
    });
    if (response.ok) location.assign("/");
    else message.textContent = await response.text();
  } catch {
    message.textContent = "The server doesn't answer. Try again.";
  }
});

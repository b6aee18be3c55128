// First on the page, so that nothing fails unseen: what went wrong is shown, and kept in an
// attribute for those who test the page.
(() => {
  const errors = [];
  const note = (message) => {
    errors.push(String(message));
    document.documentElement.dataset.errors = JSON.stringify(errors);
    const place = document.getElementById("trouble");
    if (place) {
      place.hidden = false;
      place.textContent = `Something could not be shown: ${errors.join("; ")}`;
    }
  };
  addEventListener("error", (event) => note(event.message || `${event.target.tagName} failed`), true);
  addEventListener("unhandledrejection", (event) => note(event.reason));
  addEventListener("securitypolicyviolation", (event) => note(`blocked: ${event.blockedURI}`));
  document.documentElement.dataset.errors = "[]";
})();

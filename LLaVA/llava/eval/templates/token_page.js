for (const box of document.querySelectorAll(".selection")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const slider = box.querySelector("input"), said = box.querySelector("output");
  const figures = box.querySelectorAll("figure"), panels = [];
  let timer = null;
  for (const [place, method] of data.methods.entries()) for (const [number, view] of data.views.entries()) {
    const figure = figures[place * data.views.length + number], image = new Image();
    const canvas = figure.querySelector("canvas"), count = figure.querySelector(".count");
    image.onload = () => { canvas.width = image.width; canvas.height = image.height; show(); };
    image.src = view.image;
    panels.push({method, view, number, image, canvas, count});
  }
  const most = Math.max(...data.methods.map(method => method.places ? method.places.length : 0));
  slider.max = most;
  slider.value = most;
  function show() {
    const step = Number(slider.value);
    said.textContent = `${step} of ${most}`;
    for (const {method, view, number, image, canvas, count} of panels) {
      const pen = canvas.getContext("2d"), wide = canvas.width / view.columns, high = canvas.height / view.rows;
      if (!image.complete || !canvas.width) continue;
      pen.drawImage(image, 0, 0);
      if (!method.places) continue;
      pen.fillStyle = "rgba(235,235,235,.78)";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      const kept = method.places.slice(0, step), here = kept.filter(place => place && place[0] === number);
      for (const [, row, column] of here)
        pen.drawImage(image, column * wide, row * high, wide, high, column * wide, row * high, wide, high);
      const last = step < most && kept[kept.length - 1];
      if (last && last[0] === number) {
        pen.strokeStyle = "#D55E00";
        pen.lineWidth = Math.max(2, wide / 8);
        pen.strokeRect(last[2] * wide, last[1] * high, wide, high);
      }
      count.textContent = here.length;
    }
  }
  function move(by) { slider.value = Number(slider.value) + by; show(); }
  function stop() { clearInterval(timer); timer = null; play.textContent = "\u25B6"; }
  const [back, play, next] = box.querySelectorAll("button");
  slider.addEventListener("input", show);
  back.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= most) slider.value = 0;
    play.textContent = "\u23F8";
    timer = setInterval(() => { move(1); if (Number(slider.value) >= most) stop(); }, 120);
  });
}
